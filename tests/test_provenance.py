"""Provenance: hashes, the chain from a pretrained network to a student's student, resuming, licences."""

import hashlib

import lightning as L
import pytest
import torch
from torch import nn

from sclightning.adapters import Guided
from sclightning.data import DigitsDataModule
from sclightning.modules import ConsistencyDistillation, ConsistencyTraining, TrigFlowDiffusion
from sclightning.modules.consistency import load_backbone
from sclightning.provenance import is_non_commercial, merge, notice, of_checkpoint, recorded

pytestmark = pytest.mark.filterwarnings("ignore")

EDM = {"name": "edm-cifar10", "licence": "CC BY-NC-SA 4.0", "sha256": "0" * 64, "source": "nvlabs"}
GUIDE = {"name": "guide", "licence": "MIT", "sha256": "1" * 64, "source": "elsewhere"}


@pytest.fixture
def fit(quiet, tmp_path):
    """Train a module for some steps and save it."""

    def fit(module, name, max_steps=1, ckpt_path=None):
        trainer = L.Trainer(**quiet, max_steps=max_steps, default_root_dir=tmp_path)
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=4), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / name)
        return tmp_path / name

    return fit


def provenance(path):
    return torch.load(path, weights_only=True)["provenance"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_chain_from_a_pretrained_network_to_a_students_student(make_net, fit):
    """The teacher's file with its hash, and everything that the teacher was made from, nearest first."""
    backbone = make_net()
    backbone.provenance = EDM
    teacher = fit(TrigFlowDiffusion(backbone, sigma_data=0.752), "teacher.ckpt")
    assert provenance(teacher) == [EDM]
    student = fit(ConsistencyDistillation(make_net(), str(teacher), sigma_data=0.752), "student.ckpt")
    second = fit(ConsistencyTraining(make_net(), str(student), sigma_data=0.752), "second.ckpt")
    own = {"name": "checkpoint teacher.ckpt", "licence": None, "sha256": sha256(teacher), "source": str(teacher)}
    assert provenance(student) == [own, EDM]
    third = {"name": "checkpoint student.ckpt", "licence": None, "sha256": sha256(student), "source": str(student)}
    assert provenance(second) == [third, own, EDM] == of_checkpoint(str(second))[1:]
    assert sha256(teacher) != sha256(student)


def test_teacher_with_its_own_weights(make_net, fit):
    """A network with a ``provenance``, and one more inside it."""
    teacher = make_net()
    teacher.provenance, teacher.out_conv.provenance = EDM, GUIDE
    module = ConsistencyDistillation(make_net(), teacher=teacher, sigma_data=0.752)
    path = fit(module, "student.ckpt")
    assert provenance(path) == [EDM, GUIDE]
    assert ConsistencyDistillation.load_from_checkpoint(path, backbone=make_net()).provenance == [EDM, GUIDE]


def test_teacher_and_guide_out_of_checkpoints(make_net, fit):
    """The licence that a checkpoint carries passes through ``load_backbone``; a network of our own has no record."""
    first = TrigFlowDiffusion(make_net(), sigma_data=0.752)
    first.backbone.provenance = EDM
    path = fit(first, "first.ckpt")
    teacher = Guided(make_net(), scale=1.5, guide=load_backbone(make_net(), str(path)))
    student = fit(ConsistencyDistillation(make_net(), teacher=teacher, sigma_data=0.752), "student.ckpt")
    assert [record["sha256"] for record in provenance(student)] == [sha256(path), EDM["sha256"]]


def test_resuming_keeps_the_record(make_net, fit):
    """Also with the teacher's file in another place: the same weights are one record, others are one more."""
    teacher = fit(TrigFlowDiffusion(make_net(), sigma_data=0.752), "teacher.ckpt")
    first = fit(ConsistencyTraining(make_net(), str(teacher), sigma_data=0.752), "first.ckpt")
    moved = teacher.rename(teacher.with_name("moved.ckpt"))
    second = fit(ConsistencyTraining(make_net(), str(moved), sigma_data=0.752), "second.ckpt", 2, first)
    assert [record["sha256"] for record in provenance(second)] == [sha256(moved)]
    third = fit(ConsistencyTraining(make_net(), str(first), sigma_data=0.752), "third.ckpt", 3, second)
    assert {record["sha256"] for record in provenance(third)} == {sha256(moved), sha256(first)}


def test_nothing_is_recorded_where_nothing_was_taken(make_net, fit):
    assert provenance(fit(ConsistencyTraining(make_net(), sigma_data=0.752), "own.ckpt")) == []
    assert recorded(nn.Linear(2, 2)) == [] == merge() and notice([]) is None


def test_folder_of_shards_is_hashed_whole(tmp_path):
    """Any byte of any file counts, and so does its provenance."""
    torch.save({"provenance": [EDM]}, tmp_path / "meta.pt")
    (tmp_path / "__0_0.distcp").write_bytes(b"weights")
    before = of_checkpoint(str(tmp_path))
    (tmp_path / "__0_0.distcp").write_bytes(b"weightz")
    after = of_checkpoint(str(tmp_path))
    assert before[1] == after[1] == EDM and len(before[0]["sha256"]) == 64
    assert before[0]["sha256"] != after[0]["sha256"]


@pytest.mark.parametrize(
    ("licence", "bound"),
    [
        ("CC BY-NC-SA 4.0", True),
        ("cc-by-nc-4.0", True),
        ("NVIDIA Source Code License-NC", True),
        ("FLUX.1 [dev] Non-Commercial License", True),
        ("research only", True),
        ("Apache-2.0", False),
        ("CC BY-SA 4.0", False),
        ("Tencent", False),
        ("encore", False),
        (None, False),
    ],
)
def test_licences_that_forbid_commercial_use(licence, bound):
    assert is_non_commercial(licence) is bound


def test_notice_names_who_binds():
    """One sentence, and only of those who do."""
    assert notice([GUIDE, EDM]) == (
        "These weights derive from edm-cifar10 (CC BY-NC-SA 4.0) and may not be used commercially."
    )
    assert notice([GUIDE, {"name": "unknown", "licence": None, "sha256": None, "source": None}]) is None
