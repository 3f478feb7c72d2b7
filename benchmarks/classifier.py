"""Train the small classifier in whose features Fréchet distances are taken, and print its held-out accuracy.

Usage: python benchmarks/classifier.py --data digits --out runs/demo/classifier.pt
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as nnF

from sclightning.data import DigitsDataModule, FashionMNISTDataModule
from sclightning.metrics import ClassifierFeatures

DISTANCE = "Fréchet distance\nin a classifier's features"  # as axes are labelled
DATA = {"digits": (DigitsDataModule, 40), "fashion-mnist": (FashionMNISTDataModule, 8)}


def train(data: str, out: Path, seed: int = 0) -> float:
    """Train on the training split, save the weights, return the accuracy on the held-out split."""
    torch.manual_seed(seed)
    module, epochs = DATA[data][0](), DATA[data][1]
    images, labels = (torch.from_numpy(a) for a in (module.split("train").images, module.split("train").labels))
    net = ClassifierFeatures(in_channels=images.shape[1], num_classes=module.num_classes)
    steps = epochs * len(images) // 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = nnF.cross_entropy(net.logits(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), out)
    held_out = module.split("held_out")
    with torch.no_grad():
        guess = torch.cat([net.logits(chunk).argmax(1) for chunk in torch.from_numpy(held_out.images).split(1000)])
    return (guess == torch.from_numpy(held_out.labels)).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/classifier.pt"))
    args = parser.parse_args()
    print(f"held-out accuracy {train(args.data, args.out):.4f}, weights in {args.out}")
