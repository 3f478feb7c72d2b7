"""The tile configurations, one table per architecture: nothing is searched at run time.

Hopper's were chosen and timed on an H200 (benchmarks/results/jvp_attention.json); the others compile without
spills (tests/test_ops_triton.py) and were not timed.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tile of a kernel.

    Attributes:
        BM: Queries of a program.
        BN: Keys of a step.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        tma: Whether keys and values are loaded by tensor descriptors (Hopper's and newer copy engine), not by pointers.
        resident: Programs that fit one multiprocessor; for the kernels whose programs run over many heads.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    tma: bool = False
    resident: int = 1


# Head dimension up to, number of keys up to, configuration: the first row that holds both.
LONG = 2**31
AMPERE = [
    (64, LONG, Config(64, 32, 4, 2)),
    (96, LONG, Config(64, 32, 4, 2)),
    (128, LONG, Config(64, 32, 8, 2)),
    (256, LONG, Config(32, 16, 4, 2)),
]
HOPPER = [
    (64, 512, Config(64, 32, 4, 2, tma=True)),
    (64, LONG, Config(128, 128, 8, 3, tma=True)),
    (96, 512, Config(64, 64, 4, 2)),
    (96, LONG, Config(64, 64, 4, 2, tma=True)),
    (128, LONG, Config(128, 64, 8, 2, tma=True)),
    (256, LONG, Config(128, 32, 8, 2, tma=True)),
]
BLACKWELL = [  # sm_100 keeps accumulators in tensor memory, which 128 queries of 128 columns overflow
    (64, LONG, Config(64, 64, 4, 3, tma=True)),
    (128, LONG, Config(64, 64, 4, 2, tma=True)),
    (256, LONG, Config(64, 32, 4, 1, tma=True)),
]


def attention_config(capability: tuple[int, int], D: int, NK: int) -> Config:
    """Configuration of ``attention_jvp_kernel`` for a head dimension and a number of keys."""
    table = {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL}.get(capability[0], AMPERE)  # sm_120 has Ampere's matrix units
    return next(config for D_up_to, NK_up_to, config in table if D_up_to >= D and NK_up_to >= NK)


def small_config(capability: tuple[int, int], D: int, N: int) -> Config | None:
    """Configuration of ``attention_jvp_small_kernel``, or None if heads of N positions are not its kind."""
    if N > 64 or D not in (16, 32, 64) or capability[0] not in (9, 10, 11):  # the others lack its tensor descriptors
        return None
    return Config(64, 64, 4, 3, tma=True)


def cosine_config(capability: tuple[int, int], D: int, N: int) -> Config:
    """Configuration of the cosine kernels for a head dimension and N positions; N <= BN takes the small kernel."""
    if N <= 64:
        return Config(64, 64, 4, 1, resident=4)
    return Config(64, 64, 4, 3, resident=2) if capability[0] == 9 and D <= 64 else Config(64, 32, 4, 2, resident=2)
