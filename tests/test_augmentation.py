"""EDM's augmentation: the map of each parameter in closed form, its condition, and the random numbers."""

import math

import numpy as np
import pytest
import torch

from sclightning.data.augmentation import CONDITION_DIM, condition, draw_parameters, transform


def parameters(**a):
    """One row of parameters, zero but for those given as ``a3=0.5``."""
    row = torch.zeros(1, 8)
    for name, value in a.items():
        row[0, int(name[1])] = value
    return row


def image(size=32, x=0.0, y=0.0):
    """A narrow bump at (x, y), in pixels right of and below the centre."""
    c = torch.arange(size) - (size - 1) / 2
    return torch.exp(-((c[None] - x) ** 2 + (c[:, None] - y) ** 2) / 8)[None, None]


def centre(images):
    """Centre of mass in pixels right of and below the centre, and mass."""
    c = torch.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    mass = images.sum()
    return (images.sum((0, 1, 2)) * c).sum() / mass, (images.sum((0, 1, 3)) * c).sum() / mass, mass


def test_nothing_and_flips_are_exact():
    """Zero parameters leave images alone, a_0 mirrors left to right, a_1 top to bottom."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for a, expected in (({}, images), ({"a0": 1}, images.flip(3)), ({"a1": 1}, images.flip(2))):
        torch.testing.assert_close(transform(images, parameters(**a).expand(2, 8)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact(quarters):
    """a_3 = π/2 is a turn to the left as the picture is seen, y pointing down."""
    images = torch.rand(1, 3, 8, 8)
    turned = transform(images, parameters(a3=quarters * math.pi / 2))
    torch.testing.assert_close(turned, images.rot90(quarters, (2, 3)), rtol=0, atol=1e-5)


def test_translation_is_an_eighth_of_the_width():
    """a_6 = 1 moves to the right, a_7 = 1 down, by 4 of 32 pixels; what comes in is a reflection."""
    images = torch.rand(1, 1, 32, 32)
    right, down = transform(images, parameters(a6=1.0)), transform(images, parameters(a7=1.0))
    torch.testing.assert_close(right[..., 4:], images[..., :-4], rtol=0, atol=1e-4)
    torch.testing.assert_close(right[..., :4], images[..., :4].flip(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(down[:, :, 4:], images[:, :, :-4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("a", [-1.5, 1.0])
def test_scaling_is_two_to_the_fifth_of_a(a):
    """The bump moves away from the centre by 2^(0.2 a), and its mass grows by the square."""
    before = image(x=4.0, y=-3.0)
    x, y, mass = centre(transform(before, parameters(a2=a)))
    factor = 2 ** (0.2 * a)
    assert (x, y) == (pytest.approx(4 * factor, abs=0.05), pytest.approx(-3 * factor, abs=0.05))
    assert mass / before.sum() == pytest.approx(factor**2, rel=0.01)


@pytest.mark.parametrize("angle", [0.0, 0.7, math.pi / 2])
def test_anisotropy_stretches_along_a4_and_squeezes_across(angle):
    """A bump along the direction moves out by 2^(0.2 a), one across it moves in, and the mass stays."""
    factor, r = 2**0.2, 6.0
    for along, scale in ((0.0, factor), (math.pi / 2, 1 / factor)):
        direction = math.cos(angle + along), math.sin(angle + along)
        before = image(x=r * direction[0], y=r * direction[1])
        x, y, mass = centre(transform(before, parameters(a4=angle, a5=1.0)))
        assert x == pytest.approx(scale * r * direction[0], abs=0.05)
        assert y == pytest.approx(scale * r * direction[1], abs=0.05)
        assert mass / before.sum() == pytest.approx(1, rel=0.01)


def test_order_flip_then_turn_then_move():
    """The affine maps do not commute: x-flip comes first, translation last."""
    x, y, _ = centre(transform(image(x=5.0), parameters(a0=1, a3=math.pi / 2, a6=1.0)))
    # (5, 0) -> (-5, 0) -> turned to the left, which is (0, 5) with y down -> (4, 5)
    assert (x, y) == (pytest.approx(4, abs=0.05), pytest.approx(5, abs=0.05))


def test_condition_says_what_was_done():
    """Nine numbers in the order of the paper's table; zero for an upright image."""
    a = torch.tensor([[1, 1, 0.5, 0.3, 0.7, -2.0, 0.1, -0.4]])
    expected = [1, 1, 0.5, math.cos(0.3) - 1, math.sin(0.3), -2 * math.cos(0.7), -2 * math.sin(0.7), 0.1, -0.4]
    torch.testing.assert_close(condition(a), torch.tensor([expected]))
    assert condition(torch.zeros(2, 8)).tolist() == [[0.0] * CONDITION_DIM] * 2


def test_parameters_have_the_distribution_of_the_table():
    """Probabilities, ranges and moments over 4,000 images; a coin for each x-flip whatever the probability."""
    a = draw_parameters(0, range(4000), 0.25).double().numpy()
    assert a.shape == (4000, 8)
    on = (a != 0).mean(0)
    assert on[0] == pytest.approx(0.5, abs=0.03) and on[1] == pytest.approx(0.125, abs=0.02)
    assert np.abs(on[2:] - 0.25).max() < 0.03
    assert ((a[:, 4] != 0) == (a[:, 5] != 0)).all() and ((a[:, 6] != 0) == (a[:, 7] != 0)).all()
    gates = (a[:, [2, 3, 4, 6]] != 0).astype(float)
    assert np.abs(np.corrcoef(gates.T) - np.eye(4)).max() < 0.06  # independent of each other
    for i in (2, 5, 6, 7):
        assert a[a[:, i] != 0, i].std() == pytest.approx(1, abs=0.08)
    for i in (3, 4):
        angles = a[a[:, i] != 0, i]
        assert np.abs(angles).max() <= math.pi and angles.std() == pytest.approx(math.pi / 3**0.5, rel=0.05)
    assert set(a[:, 0]) == {0, 1} == set(a[:, 1])
    assert (draw_parameters(0, range(50), 0.0)[:, 1:] == 0).all()


def test_parameters_are_a_function_of_seed_and_position():
    """The same for a position whatever batch it comes in, another for another seed or position."""
    whole = draw_parameters(3, range(10), 1.0)
    assert torch.equal(draw_parameters(3, range(4, 10, 2), 1.0), whole[4:10:2])
    rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(1, 7)))  # (2, position) is that of latents' noise
    assert whole[7, 0] == rng.integers(0, 2, 2)[0] and whole[7, 2] == pytest.approx(rng.standard_normal(4)[0], rel=1e-6)
    assert not (whole[0] == whole[1])[2:].any() and not (draw_parameters(4, [0], 1.0)[0] == whole[0])[2:].any()
