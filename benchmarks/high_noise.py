r"""A Fashion-MNIST teacher where there is hardly anything but noise, against the exact denoiser of the training images.

Given x_t and its class, the mean of x_0 over the 6,000 training images of the class is known: softmax weights
:math:`-|x_t - \cos t\,x_0|^2 / 2\sigma_d^2\sin^2 t`. A network that generalises is to agree with it where many images
count, as from a noise level of 10 on: ``images`` is how many, the mean of :math:`1/\sum w^2`. For each noise level also
``spread``, the mean square of the exact denoiser's distance from the class's mean image; ``error``, that of the
teacher's from the exact one; and ``slope`` of the teacher on the exact denoiser along the class's first principal
component, 1 where it is right.

Usage: python benchmarks/high_noise.py runs/fashion_mnist/full/seed1 [--images 200]
"""

import argparse
import json
import math
from pathlib import Path

import torch
from fashion_mnist import SEARCH_SEED
from provenance import commit
from torch import Tensor

from sclightning.checkpoint import backbone_weights, read_checkpoint
from sclightning.cli import SCLightningCLI
from sclightning.trigflow import denoise, interpolate

SIGMAS = (10.0, 17.5, 35.0, 70.0, 112.0)


def posterior(x_t: Tensor, t: float, data: Tensor, sigma_data: float) -> Tensor:
    """Probability (N, M) that x_t (N, D) is a noisy one of ``data`` (M, D), of which each is as likely."""
    square = torch.cdist(x_t, math.cos(t) * data, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.softmax(-square / (2 * (sigma_data * math.sin(t)) ** 2), 1)


def compare(found: Tensor, ideal: Tensor, mean: Tensor, component: Tensor) -> Tensor:
    """Sums over images (N, D), ``mean`` taken off: squares of ideal and error; product, square along a component."""
    along, right = (found - mean) @ component, (ideal - mean) @ component
    sums = (ideal - mean).square().sum(), (found - ideal).square().sum(), along @ right, right @ right
    return torch.stack(sums).double()


def main() -> None:
    """Compare at each noise level, all classes alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a seed, with the teacher in it")
    parser.add_argument("--images", type=int, default=200, help="noisy images at each noise level")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist_high_noise.json"))
    args = parser.parse_args()
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.logger=false"]
    cli = SCLightningCLI(["--config", str(args.folder / "teacher.yaml"), *cpu], run=False)
    model, data = cli.model.eval(), cli.datamodule
    model.backbone.load_state_dict(backbone_weights(read_checkpoint(str(args.folder / "teacher/last.ckpt"))))
    train = data.split("train")
    images, labels = data.from_uint8(torch.from_numpy(train.images)), torch.from_numpy(train.labels)
    generator, count = torch.Generator().manual_seed(SEARCH_SEED), args.images // data.num_classes
    sums = torch.zeros(len(SIGMAS), 5, dtype=torch.float64)
    for label in range(data.num_classes):
        own = images[labels == label]
        flat = own.flatten(1)
        mean, component = flat.mean(0), torch.linalg.eigh(torch.cov(flat.T))[1][:, -1]
        for row, sigma in zip(sums, SIGMAS, strict=True):
            x_0 = own[torch.randperm(len(own), generator=generator)[:count]]
            z, t = model.sigma_data * torch.randn(x_0.shape, generator=generator), math.atan(sigma / model.sigma_data)
            time = torch.full((count,), t)
            x_t = interpolate(x_0, z, time)
            with torch.no_grad():
                F = model(x_t / model.sigma_data, time, torch.full((count,), label))
            found = denoise(F, x_t, time, model.sigma_data).flatten(1)
            weights = posterior(x_t.flatten(1), t, flat, model.sigma_data)
            row[:4] += compare(found, weights @ flat, mean, component)
            row[4] += weights.square().sum(1).reciprocal().sum()
    rows, total = [], count * data.num_classes
    for sigma, (spread, error, product, square, effective) in zip(SIGMAS, sums.tolist(), strict=True):
        means = {"images": effective / total, "spread": spread / total, "error": error / total}
        rows.append({"sigma": sigma, **means, "slope": product / square})
        print(*(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    made = {"teacher": f"{args.folder}/teacher/last.ckpt", "images": total, "rows": rows}
    made |= {"versions": {"torch": torch.__version__}, "commit": commit()}
    args.out.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
