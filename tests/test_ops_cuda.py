"""The CUDA extension: its source run on a CPU by emulation, compiled for GPUs that are not here, and run on a GPU."""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sclightning.ops import cosine_attention, jvp_attention, reference
from sclightning.ops.cuda import build

pytest.importorskip("triton")  # launch.py hands over to it

from sclightning.ops import triton
from sclightning.ops.cuda import launch

EMULATION = Path(__file__).parent / "cuda_emulation"
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 6e-4}
COSINE_BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 6e-4}  # the normalised vectors are rounded
LATE = [(copies, products) for copies in (0, 1) for products in (0, 1)]
# `import sclightning.ops.jvp_attention` is the function of that name
operators = sys.modules["sclightning.ops.jvp_attention"]


def relative_error(x, expected):
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# --- the emulation: csrc compiled by g++ against the instructions in tests/cuda_emulation


def emulate(folder, sources=build.SOURCES):
    """The extension for this CPU: the same source, its instructions from emulation.hpp, its memory that of tensors."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    files = (*sources.glob("*.cu"), *EMULATION.glob("*.cpp"))
    (folder / "all.cpp").write_text("".join(f'#include "{file}"\n' for file in files))
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-Wno-psabi", "-DSCLIGHTNING_EMULATION", f"-I{EMULATION}"]
    command = ["g++", *flags, '-DSCLIGHTNING_BUILD="emulation"', "-shared", "all.cpp", "-o", "emulation.so"]
    subprocess.run(command, check=True, cwd=folder)
    library = build.open_library(folder / "emulation.so", device="cpu")
    library.emulation_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return emulate(tmp_path_factory.mktemp("emulation"))


BREAKS = {  # what is left out of the kernels, by what that shows in, and what the emulation says
    "softmax": {
        r"barrier_wait\(.*shared.k_ready.*;": "copy in flight|copy into",
        r"barrier_wait\(shared.q_ready.*;": "copy in flight|copy into",
        r"barrier_wait\(shared.v_empty.*;": "copy into",
        r"barrier_arrive\(shared.v_empty.*;": "deadlock",
        r"wgmma_wait<1>\(\);  // for ts": "copy into|expected",
        r"wgmma_wait<0>\(\);": "copy into",
        r"wgmma_fence\(\);": "without wgmma.fence",
        r"if \(lane == 0\) barrier_arrive\(shared.q_empty\(\)\);": "deadlock",
        r"pass_turn\(1 - warpgroup\);": "deadlock",
    },
    "cosine": {
        r"(?<!  )  sync_threads\(\);": "no barrier",
        r"barrier_wait\(shared.q_full\(\), queries.*;": "copy in flight|unfinished product",
        r"barrier_wait\(shared.v_full\(stage\), parity\);": "copy in flight|unfinished product",
        r"proxy_fence\(\);": "stored without a fence",
        r"barrier_wait\(shared.v_ready.*;": "unfinished product|without a fence|copy in flight|assert",
    },
    "small": {
        r"barrier_wait\(shared.q_full\(\), parity\);": "copy in flight|expected",
        r"barrier_wait\(shared.v_full\(0\), parity\);": "copy in flight|expected",
        r"sync_threads\(\);  // each warp": "copy into",
        r"sync_threads\(\);\n *if \(copies_next\) copy_values": "copy into",
    },
    "small cosine": {
        r"barrier_wait\(shared.q_full\(\) \+ i.*;": "copy in flight|expected",
        r"      sync_threads\(\);": "an unfinished product reads",
    },
}
STATEMENTS = [(case, statement) for case, statements in BREAKS.items() for statement in statements]


def run_case(library, case):
    """A shape of the kernel in which one of ``BREAKS`` shows."""
    torch.manual_seed(0)
    if "cosine" in case:
        check_cosine(library, *((1, 6, 64, 64) if "small" in case else (1, 3, 64, 200)), torch.bfloat16, 1)
    else:
        shape, blocks = ((1, 6, 64, 64, 64), 1) if case == "small" else ((1, 3, 150, 500, 64), 2)
        check(library, *inputs(*shape, torch.bfloat16), blocks)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The extension for head dimensions up to 64, with switches that leave one of ``BREAKS`` out."""
    sources = tmp_path_factory.mktemp("csrc")
    shutil.copytree(build.SOURCES, sources, dirs_exist_ok=True)
    text = (sources / "jvp_attention.cuh").read_text()
    for i, (_, statement) in enumerate(STATEMENTS, 1):
        text, places = re.subn(statement, rf"if (emulation::machine.broken != {i}) \g<0>", text)
        assert places
    (sources / "jvp_attention.cuh").write_text(text)
    text, places = re.subn(r"\n  if \(a.D <= (72|128)\).*", "", (sources / "launch.cuh").read_text())
    assert places == 2
    (sources / "launch.cuh").write_text(text.replace("Layout256", "Layout64"))
    library = emulate(sources, sources)
    for case in BREAKS:
        run_case(library, case)
    return library


def inputs(B, H, N, M, D, dtype, strided=False):
    def tensor(n):
        return torch.randn(B, n, H, D).transpose(1, 2).to(dtype) if strided else torch.randn(B, H, n, D).to(dtype)

    return [tensor(n) for n in (N, M, M)], [tensor(n) for n in (N, M, M)]


def check(library, x, t, blocks=3, scale=None):
    """Errors of output, tangent and log-sum-exp against float64; the outputs start as NaN."""
    scale = x[0].shape[-1] ** -0.5 if scale is None else scale
    o, to = (reference.output_like(x[0], x[2]).fill_(torch.nan) for _ in range(2))
    lse = torch.full(x[0].shape[:3], torch.nan)
    launch.launch_attention(library, *x, *t, o, to, lse, scale, blocks)
    exact = reference.attention_jvp(*(a.double() for a in (*x, *t)), scale)
    errors = [relative_error(a, b) for a, b in zip((o, to, lse), exact, strict=True)]
    assert max(errors) < BOUNDS[x[0].dtype], (errors, [a.shape for a in x])


def check_cosine(library, B, H, D, N, dtype, blocks):
    """Likewise for cosine attention, of vectors of lengths from a hundredth to a hundred, one of them zero."""
    x, tx = torch.randn(2, B, H, D, 3, N).to(dtype) * torch.logspace(-2, 2, N).to(dtype)
    x[..., -1] = 0
    o, to = (torch.full((B, H, D, N), torch.nan, dtype=dtype) for _ in range(2))
    lse = torch.full((B, H, N), torch.nan)
    tx[..., -1] = 0  # the tangent of a norm has no meaning where the vector vanishes
    launch.launch_cosine(library, x, tx, o, to, lse, D**-0.5, 1e-4, blocks)
    y = (a.transpose(2, 4).unbind(3) for a in reference.pixel_norm_jvp(x.double(), tx.double(), 2, 1e-4))
    exact = reference.attention_jvp(*(a for triple in y for a in triple), D**-0.5)
    errors = [relative_error(a, b) for a, b in zip((o.transpose(2, 3), to.transpose(2, 3), lse), exact, strict=True)]
    assert max(errors) < COSINE_BOUNDS[dtype], errors


SHAPES = {  # B, H, queries, keys, D, multiprocessors
    "whole heads in shared memory": (1, 5, 256, 256, 64, 2),
    "ragged, whole heads": (2, 2, 150, 200, 64, 3),
    "streamed, around the ring of six": (1, 1, 130, 515, 64, 2),
    "one query, a key more than a block": (1, 3, 1, 65, 64, 2),
    "fewer columns": (1, 2, 70, 80, 40, 9),
    "72": (1, 2, 140, 260, 72, 2),
    "fewer than 72, whole heads": (1, 3, 140, 190, 66 // 8 * 8 + 8, 2),
    "128": (1, 2, 200, 200, 128, 2),
    "fewer than 128": (2, 1, 65, 129, 80, 1),
    "256": (1, 2, 130, 129, 256, 2),
    "fewer than 256": (1, 1, 64, 70, 136, 1),
    "small heads": (1, 6, 64, 64, 64, 1),
    "ragged small heads": (3, 5, 50, 40, 56, 1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_emulated_values(emulated, case):
    *shape, D, blocks = SHAPES[case]
    torch.manual_seed(0)
    for i, dtype in enumerate(BOUNDS):
        emulated.emulation_configure(i, *LATE[(len(case) + 2 * i) % 4], 0)
        check(emulated, *inputs(*shape, D, dtype, strided=i == 1), blocks)


COSINE_SHAPES = [(1, 3, 64, 256, 2), (2, 2, 64, 136, 9), (1, 1, 64, 520, 2), (1, 3, 24, 72, 1)]
COSINE_SHAPES += [(2, 5, 64, 64, 1), (1, 5, 40, 24, 9)]  # small heads


@pytest.mark.parametrize("B, H, D, N, blocks", COSINE_SHAPES)
def test_emulated_values_of_cosine_attention(emulated, B, H, D, N, blocks):
    torch.manual_seed(0)
    for i, dtype in enumerate(BOUNDS):
        emulated.emulation_configure(i, *LATE[(H + 2 * i) % 4], 0)
        check_cosine(emulated, B, H, D, N, dtype, blocks)


@pytest.mark.parametrize("late", LATE)
def test_values_do_not_depend_on_the_order_of_events(emulated, late):
    """Copies and products at once or as late as can be, warps in four orders: the same bits."""
    torch.manual_seed(0)
    x, t = inputs(1, 2, 150, 200, 64, torch.bfloat16)
    results = []
    for seed in range(4):
        emulated.emulation_configure(seed, *late, 0)
        o, to, lse = torch.empty_like(x[0]), torch.empty_like(x[0]), torch.empty(1, 2, 150)
        launch.launch_attention(emulated, *x, *t, o, to, lse, 0.125, 1 + seed)
        results.append((o, to, lse))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    assert relative_error(results[0][1], reference.attention_jvp(*(a.double() for a in (*x, *t)), 0.125)[1]) < 2.5e-3


CASES = {
    "large logits": lambda q, k, v, *t: (8 * q, k, v, *t),
    "one-hot rows": lambda q, k, v, *t: (20 * k, k, v, *t),
    "tiny tangents": lambda q, k, v, *t: (q, k, v, *(1e-3 * a for a in t)),
    "offset values": lambda q, k, v, *t: (q, k, v + 3, *t),
}


@pytest.mark.parametrize("case", CASES)
def test_emulated_accuracy_of_hard_cases(emulated, case):
    torch.manual_seed(0)
    emulated.emulation_configure(0, 0, 1, 0)
    for dtype in BOUNDS:
        x = [a.to(dtype) for a in CASES[case](*torch.randn(6, 1, 2, 128, 64))]
        check(emulated, x[:3], x[3:])


@pytest.mark.parametrize("case, statement", STATEMENTS)
def test_the_emulation_sees_what_is_left_out(broken, case, statement):
    said = ""
    for late in LATE:
        broken.emulation_configure(0, *late, 1 + STATEMENTS.index((case, statement)))
        try:
            run_case(broken, case)
        except (RuntimeError, AssertionError) as error:
            said += str(error)
    assert re.search(BREAKS[case][statement], said), said


# --- Python's side, with the emulated library and tensors of the CPU


@pytest.fixture
def extension(emulated, monkeypatch):
    """The operators on tensors of the CPU go to launch.py, which finds the emulated library; what it calls is noted."""
    handed_over = []

    def note(*arguments):
        handed_over.append(arguments)
        return reference.attention_jvp(*arguments)

    emulated.emulation_configure(0, 0, 0, 0)
    for module in (operators, sys.modules["sclightning.ops.cosine_attention"]):
        monkeypatch.setattr(module, "implementation", lambda x, D: launch)
    monkeypatch.setattr(launch.build, "load", lambda: emulated)
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(launch.triton, "attention_jvp", note)
    monkeypatch.setattr(launch.triton, "cosine_jvp", lambda *arguments: handed_over.append(arguments))
    launch._library.cache_clear()
    launch._agrees.clear()
    yield handed_over
    launch._library.cache_clear()
    launch._agrees.clear()


def test_through_the_public_function(extension):
    """Tangents of ``torch.func.jvp``, layouts that need a copy, and a negative scale, which is Triton's."""
    torch.manual_seed(0)
    x, t = inputs(2, 2, 70, 70, 64, torch.bfloat16)
    x[1], t[2] = x[1].transpose(2, 3).contiguous().transpose(2, 3), t[2][..., :1].expand(2, 2, 70, 64)
    exact = torch.func.jvp(
        lambda q, k, v: reference.attention(q, k, v, 0.125), *(tuple(a.double() for a in y) for y in (x, t))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
    assert relative_error(o, exact[0]) < 2.5e-3 and relative_error(to, exact[1]) < 2.5e-3
    assert not extension and launch._agrees == {(launch.trial, torch.device("cpu"), torch.bfloat16, 64): True}
    torch.func.jvp(lambda q, k, v: jvp_attention(q, k, v, scale=-0.1), tuple(x), tuple(t))
    torch.func.jvp(lambda q: jvp_attention(q, *x[1:]), (x[0],), (t[0],))  # a tangent that is absent
    assert [arguments[-1] for arguments in extension] == [-0.1, 0.125]


def test_cosine_attention_through_the_public_function(extension):
    """Channels-last input, which is copied; lengths that are Triton's."""
    torch.manual_seed(0)
    x, t = (torch.randn(2, 9, 8, 2 * 64 * 3).half().permute(0, 3, 1, 2).reshape(2, 2, 64, 3, 72) for _ in range(2))
    exact = torch.func.jvp(
        lambda x: reference.attention(*reference.pixel_norm(x, 2, 1e-4).transpose(2, 4).unbind(3), 0.125).mT,
        (x.double(),),
        (t.double(),),
    )
    o, to = torch.func.jvp(cosine_attention, (x,), (t,))
    assert relative_error(o, exact[0]) < 6e-4 and relative_error(to, exact[1]) < 6e-4 and o.is_contiguous()
    assert not extension and launch._agrees == {(launch.cosine_trial, torch.device("cpu"), torch.float16, 64): True}
    for D, N in ((64, 76), (32, 72), (128, 72)):
        assert launch.cosine_jvp(*torch.randn(2, 1, 1, D, 3, N).half(), 0.1, 1e-4) is None
    assert len(extension) == 3


@pytest.mark.parametrize("N, M, D", [(64, 64, 64), (70, 70, 32), (0, 70, 64), (70, 70, 96)])
def test_shapes_that_stay_with_triton(extension, N, M, D):
    x, t = inputs(1, 2, N, M, D, torch.float16)
    launch.attention_jvp(*x, *t, 0.1)
    assert len(extension) == 1 and not launch._agrees


def test_a_wrong_kernel_is_found_on_first_use(extension, monkeypatch, tmp_path):
    """Values read from the wrong rows: one warning per dtype and head dimension, and Triton."""
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    for file, old, new in (
        ("jvp_attention.cuh", "i * 16 * L::ROW_BYTES", "i * 8 * L::ROW_BYTES"),
        ("launch.cuh", "return attention_fp16", "return attention_bf16"),
        ("launch.cuh", "Layout72", "Layout64"),
        ("launch.cuh", "Layout128", "Layout64"),
        ("launch.cuh", "Layout256", "Layout64"),
    ):
        (sources / file).write_text((sources / file).read_text().replace(old, new))
    library = emulate(sources, sources)
    monkeypatch.setattr(launch.build, "load", lambda: library)
    x, t = inputs(1, 2, 70, 70, 64, torch.bfloat16)
    with pytest.warns(UserWarning, match="is wrong on cpu.*Triton's takes over"):
        launch.attention_jvp(*x, *t, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.attention_jvp(*x, *t, 0.1)
    assert len(extension) == 2


def test_no_library_is_one_warning_and_triton(extension, monkeypatch, tmp_path):
    """Without a compiler, and with one that fails; the reason is in the warning."""
    x, t = inputs(1, 1, 70, 70, 64, torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(launch.triton, "attention_jvp", lambda *arguments: extension.append(arguments))
    monkeypatch.setenv("SCLIGHTNING_CACHE", str(tmp_path / "cache"))
    for nvcc, reason in ((None, "no nvcc was found"), (tmp_path / "bin/nvcc", "disk full")):
        if nvcc:
            nvcc.parent.mkdir()
            nvcc.write_text("#!/bin/sh\ntest $1 = --version && echo V13.0.1 && exit\necho disk full; exit 1\n")
            nvcc.chmod(0o755)
        monkeypatch.setattr(build, "find_nvcc", lambda nvcc=nvcc: nvcc and str(nvcc))
        launch._library.cache_clear()
        with pytest.warns(UserWarning, match=f"(?s){reason}.*Triton's kernels take over"):
            launch.attention_jvp(*x, *t, 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            launch.attention_jvp(*x, *t, 0.1)
    assert len(extension) == 4


def test_arguments_are_checked_before_the_launch(emulated):
    x, t = inputs(1, 2, 70, 80, 64, torch.bfloat16)
    o, lse = torch.full_like(x[0], torch.nan), torch.full((1, 2, 70), torch.nan)
    good = dict(zip(("q", "k", "v", "tq", "tk", "tv"), (*x, *t), strict=True), o=o, to=o.clone(), lse=lse)
    shifted = torch.zeros(x[1].numel() + 1, dtype=torch.bfloat16)[1:].view(x[1].shape)
    for name, bad, message in (
        ("k", x[1].half(), "cast"),
        ("lse", lse.half(), "cast"),
        ("q", x[0].float(), "cast"),
        ("tv", t[2].to("meta"), "move"),
        ("tk", t[1][:, :, 1:], "of shape"),
        ("v", x[2].mT.contiguous().mT, "unit stride"),
        ("tq", t[0][..., :1].expand_as(t[0]), "strides"),
        ("k", shifted, "at 2 bytes"),
        ("to", torch.empty(1, 70, 2, 64, dtype=torch.bfloat16).transpose(1, 2), "the same strides"),
        ("lse", lse.new_empty(1, 70, 2).transpose(1, 2), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            launch.launch_attention(emulated, **good | {name: bad}, scale=0.1, blocks=2)
    for numbers in ({"scale": -0.1, "blocks": 2}, {"scale": 0.1, "blocks": 0}):
        with pytest.raises(ValueError, match="positive scale"):
            launch.launch_attention(emulated, **good, **numbers)
    y = dict(x=torch.randn(1, 2, 64, 3, 72).half(), o=torch.randn(1, 2, 64, 72).half(), lse=torch.empty(1, 2, 72))
    y |= {"tx": y["x"], "to": y["o"]}
    for name, bad, message in (
        ("tx", y["x"].bfloat16(), "cast"),
        ("tx", y["x"].to("meta"), "move"),
        ("x", y["x"].transpose(0, 1), "of shape"),
        ("o", y["o"].mT.contiguous().mT, "contiguous"),
        ("lse", y["lse"][:, :1], "of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            launch.launch_cosine(emulated, **y | {name: bad}, scale=0.1, eps=1e-4, blocks=2)
    with pytest.raises(ValueError, match="D up to 64, N a multiple of 8"):
        y = {name: a[..., :70].contiguous() for name, a in y.items()}
        launch.launch_cosine(emulated, **y, scale=0.1, eps=1e-4, blocks=2)
    emulated.device = "cuda"
    with pytest.raises(ValueError, match="expected one device of type cuda"):
        launch.launch_attention(emulated, **good, scale=0.1, blocks=2)
    emulated.device = "cpu"
    assert o.isnan().all() and lse.isnan().all()


def test_hopper_is_where_the_extension_is_taken(monkeypatch):
    """Unless SCLIGHTNING_CUDA=0; on other GPUs never."""
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=None)
    for value, capability, expected in (
        (None, (9, 0), launch),
        ("0", (9, 0), triton),
        ("1", (9, 0), launch),
        (None, (8, 0), triton),
        (None, (10, 0), triton),
        (None, (7, 5), reference),
    ):
        monkeypatch.delenv("SCLIGHTNING_CUDA", raising=False)
        if value:
            monkeypatch.setenv("SCLIGHTNING_CUDA", value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert operators.implementation(x, 64) is expected
    assert all(hasattr(launch, name) for name in triton.__all__)


# --- building with nvcc, for GPUs that are not here


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library as ``make cuda`` builds it, and what the compiler says of its kernels."""
    nvcc = build.find_nvcc()
    if not nvcc:
        pytest.skip("nvcc is not installed")
    path = tmp_path_factory.mktemp("built") / f"{build.build_name(nvcc)}.so"
    return path, build.compile_library(nvcc, path, path.stem)


def test_no_spills_and_no_serialised_products(built):
    _, said = built
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_90a'", said)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == 14 and usage == [("0", "0", "0")] * 14, said
    assert "Performance" not in said and "injected" not in said and "warning" not in said, said


def test_machine_code_has_hoppers_instructions(built):
    import triton as installed

    path, _ = built
    tool = shutil.which("cuobjdump") or Path(installed.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    kernels = [kernel for kernel in code.split("Function : ")[1:] if "jvp_attention_" in kernel]
    products = {64: 12, 72: 15, 128: 24, 256: 48}  # of scores: three of D / 16 each; and three of 64 keys / 16
    found = {}
    for kernel in kernels:
        D, cosine, small = re.search(r"LayoutILi(\d+)E.*?ELb([01])ELb([01])E", kernel).groups()
        found[int(D), cosine, small, re.search("Bf16|Fp16", kernel)[0]] = len(re.findall("HGMMA", kernel))
        assert all(name in kernel for name in ("UTMALDG.4D", "SYNCS", "WARPGROUP.DEPBAR"))
        assert ("USETMAXREG" in kernel) == (small == "0")
        assert not re.search(r"\b(LDL|STL|HMMA)\b", kernel)
        # ptxas 13.0 has put h into the registers of queries that the next round reads
        left = re.findall(r"HGMMA\S+ R\d+, (R\d+), gdesc\[\w+\](\.tnspB)?", kernel)
        assert not {r for r, values in left if values} & {r for r, values in left if not values}
    shapes = [(D, "0", "0") for D in products] + [(64, "1", "0"), (64, "0", "1"), (64, "1", "1")]
    assert found == {(*shape, dtype): products[shape[0]] + 12 for shape in shapes for dtype in ("Bf16", "Fp16")}


def test_other_architectures_compile_to_a_trap(tmp_path):
    if not (nvcc := build.find_nvcc()):
        pytest.skip("nvcc is not installed")
    said = build.compile_library(nvcc, tmp_path / "library.so", "library", arch="sm_80")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 14 and max(registers) < 32
    build.open_library(tmp_path / "library.so")


def test_cache_is_named_by_what_it_holds(built, tmp_path, monkeypatch, capfd):
    path, _ = built
    assert re.fullmatch(r"attention-sm_90a-[0-9a-f]{16}-nvcc[0-9.]+\.so", path.name)
    assert build.open_library(path).device == "cuda"
    with pytest.raises(OSError, match="a build of something else"):  # stale, under another name
        build.open_library(shutil.copy(path, tmp_path / "attention-sm_90a-0123456789abcdef-nvcc13.0.so"))
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    assert build.source_hash(sources) == build.source_hash()
    (sources / "interface.h").write_text("// changed")
    assert build.source_hash(sources) != build.source_hash()
    # A foreign file is replaced; the result is found again, also without the compiler.
    compiled = []
    monkeypatch.setattr(build, "compile_library", lambda nvcc, to, name: compiled.append(shutil.copy(path, to)))
    monkeypatch.setenv("SCLIGHTNING_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / path.name
    cached.parent.mkdir()
    cached.write_text("not a library")
    assert build.load()._name == build.load()._name == str(cached)
    assert compiled == [cached] and "building CUDA kernels" in capfd.readouterr().err
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.load()._name == str(cached)
    monkeypatch.setattr(build, "source_hash", lambda: "f" * 16)
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        build.load()


# --- on a Hopper GPU


@pytest.fixture
def on_hopper(monkeypatch):
    """The extension switched on, and a check that the launches were its own."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setenv("SCLIGHTNING_CUDA", "1")
    launches = []
    call = launch._call

    def counted(*arguments):
        launches.append(arguments)
        call(*arguments)

    monkeypatch.setattr(launch, "_call", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; PyTorch's deprecations are its own
        yield launches
    assert launches


LENGTHS = [(65, 65), (256, 256), (80, 999), (999, 80), (1024, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("N, M", LENGTHS)
@pytest.mark.parametrize("D", [64, 72, 128, 256])
def test_values_and_gradients_on_the_gpu(on_hopper, N, M, D, dtype):
    torch.manual_seed(0)
    x = [torch.randn(2, n, 3, D, device="cuda").to(dtype).transpose(1, 2).requires_grad_() for n in (N, M, M)]
    t = [torch.randn_like(a) for a in x]
    o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
    exact = [a.detach().double().requires_grad_() for a in x]
    attention = lambda q, k, v: reference.attention(q, k, v, D**-0.5)  # noqa: E731
    expected, t_expected = torch.func.jvp(attention, tuple(exact), tuple(a.double() for a in t))
    assert relative_error(o, expected) < BOUNDS[dtype] and relative_error(to, t_expected) < BOUNDS[dtype]
    g = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, x, g), torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert relative_error(a, b) < 2.5 * BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("N, D", [(256, 64), (300, 128), (256, 256)])
def test_accuracy_of_hard_cases_on_the_gpu(on_hopper, case, dtype, N, D):
    torch.manual_seed(0)
    x = [a.to(dtype) for a in CASES[case](*torch.randn(6, 2, 3, N, D, device="cuda"))]
    o, to = torch.func.jvp(jvp_attention, tuple(x[:3]), tuple(x[3:]))
    exact = reference.attention_jvp(*(a.double() for a in x), D**-0.5)
    bound = BOUNDS[dtype]
    assert relative_error(o, exact[0]) < bound and relative_error(to, exact[1]) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("B, N", [(1, 64), (80, 64), (3, 24), (2, 72), (2, 256), (40, 256), (20, 384), (2, 1024)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cosine_attention_on_the_gpu(on_hopper, dtype, B, N):
    torch.manual_seed(0)
    x, t = (torch.randn(B, 9, 64, 3, N, device="cuda").to(dtype) for _ in range(2))
    x.requires_grad_()
    o, to = torch.func.jvp(cosine_attention, (x,), (t,))
    exact = x.detach().double().requires_grad_()
    expected = torch.func.jvp(lambda x: cosine_attention(x), (exact,), (t.double(),))
    bound = COSINE_BOUNDS[dtype]
    assert relative_error(o, expected[0]) < bound and relative_error(to, expected[1]) < bound
    g = torch.randn_like(o)
    gradients = (torch.autograd.grad(a, b, g.to(a.dtype))[0] for a, b in ((o, x), (expected[0], exact)))
    assert relative_error(*gradients) < 3 * bound


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "B, H, N, M", [(1, 1, 64, 64), (1, 3, 64, 64), (5, 3, 17, 40), (9, 133, 64, 64), (2, 3, 200, 1)]
)
def test_small_heads_on_the_gpu(on_hopper, monkeypatch, B, H, N, M, dtype):
    """Up to 64 queries and keys, and more queries."""
    monkeypatch.setattr(launch, "FEWEST_KEYS", {64: 1})
    torch.manual_seed(0)
    x, t = ([torch.randn(B, H, n, 64, device="cuda").to(dtype) for n in (N, M, M)] for _ in range(2))
    o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
    exact = reference.attention_jvp(*(a.double() for a in (*x, *t)), 0.125)
    assert relative_error(o, exact[0]) < BOUNDS[dtype] and relative_error(to, exact[1]) < BOUNDS[dtype]


@pytest.mark.gpu
def test_whole_heads_many_heads_and_repetition_on_the_gpu(on_hopper):
    """More heads than multiprocessors, so that keys stay in shared memory; the same bits every time."""
    torch.manual_seed(0)
    for B, H, N, D in ((40, 9, 256, 64), (70_000, 1, 66, 64), (200, 1, 300, 64), (64, 16, 256, 72)):
        x, t = torch.randn(2, 3, B, H, N, D, device="cuda", dtype=torch.bfloat16)
        results = [torch.func.jvp(jvp_attention, tuple(x), tuple(t)) for _ in range(5)]
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
        some = slice(-20, None)
        exact = reference.attention_jvp(*x[:, some].double(), *t[:, some].double(), D**-0.5)
        assert relative_error(results[0][0][some], exact[0]) < 2.5e-3
        assert relative_error(results[0][1][some], exact[1]) < 2.5e-3


@pytest.mark.gpu
def test_graphs_streams_and_devices(on_hopper):
    torch.manual_seed(0)
    for device in range(torch.cuda.device_count()):
        x, t = torch.randn(2, 3, 2, 3, 256, 64, device=f"cuda:{device}", dtype=torch.bfloat16)
        expected = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # the default one is of the first device
                o, to = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
            o.zero_(), to.zero_()
            graph.replay()
            assert torch.equal(o, expected[0]) and torch.equal(to, expected[1])
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = torch.func.jvp(jvp_attention, tuple(x), tuple(t))
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.equal(results[1], expected[1])
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    work = [torch.randn(2, 3, 4, 16, 2048, 128, device=device, dtype=torch.bfloat16) for device in devices]
    alone = []
    for x, t in work:
        alone.append(torch.func.jvp(jvp_attention, tuple(x), tuple(t)))
        torch.cuda.synchronize(x.device)
    for _ in range(10):  # on all devices at once
        together = [torch.func.jvp(jvp_attention, tuple(x), tuple(t)) for x, t in work]
        assert all(torch.equal(a, b) for pair in zip(together, alone, strict=True) for a, b in zip(*pair, strict=True))
