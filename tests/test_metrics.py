"""The metrics against closed forms, slow loops and extreme cases, and the classifier that gives them features.

Random tests use fixed seeds and bands of at least 5.5 standard errors: with other seeds, fewer than one in a million
would fail.
"""

from math import exp, inf, log, log10

import numpy as np
import pytest
import torch
from torch import nn

from ldm_minimal.classifier import Classifier, ClassifierConfig, classifier_loss
from ldm_minimal.metrics import frechet_distance, kid, memorisation, nearest_distance, prdc, psnr, ssim


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def pictures(n, height=28, width=28, seed=0, channels=1):
    return torch.randint(0, 256, (n, channels, height, width), generator=seeded(seed), dtype=torch.uint8)


def with_moments(mean, cov, n=50, seed=0):
    """n points whose sample mean and covariance (with n - 1) are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(cov) @ white).T + mean


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed))[0]


# --- PSNR and SSIM ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 10, 255])
def test_psnr_of_a_constant_difference(step):
    a = torch.zeros(2, 1, 9, 7, dtype=torch.uint8)
    expected = torch.full((2,), 20 * log10(255 / step), dtype=torch.float64)
    torch.testing.assert_close(psnr(a, a + step), expected)
    torch.testing.assert_close(psnr(a + step, a), expected)  # bytes are not subtracted as bytes: 0 - 10 is not 246


def test_psnr_of_known_noise():
    noise = (10 * normal(100, 1, 28, 28)).round()
    a = torch.full((100, 1, 28, 28), 128, dtype=torch.uint8)
    value = psnr(a, (128 + noise).to(torch.uint8))
    variance = 10**2 + 1 / 12  # the noise, and its rounding
    assert value.mean().item() == pytest.approx(10 * log10(255**2 / variance), abs=0.15)


def test_psnr_is_of_each_pair_and_infinite_for_equal_images():
    a, b = pictures(3), pictures(3, seed=1)
    b[1] = a[1]
    value = psnr(a, b)
    assert value.shape == (3,) and value[1] == inf and value[[0, 2]].isfinite().all()
    torch.testing.assert_close(psnr(a[:1], b[:1]), value[:1])


def slow_ssim(a, b):
    """Wang et al. 2004, one window at a time; a, b: (H, W) arrays in [0, 1]."""
    weights = np.array([[exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    scores = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            p, q = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            brightness = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
            scores.append(brightness * (2 * cov + 0.03**2) / (vp + vq + 0.03**2))
    return np.mean(scores)


@pytest.mark.parametrize("size", [(13, 16), (28, 28)], ids=str)
def test_ssim_equals_a_slow_loop_over_its_windows(size):
    a = (pictures(2, *size).double() * 0.2 + torch.linspace(0, 200, size[1])).to(torch.uint8)
    b = (a.double() + 20 * normal(*a.shape, seed=3)).clamp(0, 255).to(torch.uint8)
    expected = torch.tensor([slow_ssim(p[0].numpy() / 255, q[0].numpy() / 255) for p, q in zip(a, b)])
    torch.testing.assert_close(ssim(a, b), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(ssim(b, a), expected, atol=1e-10, rtol=0)
    assert (0.1 < expected).all() and (expected < 0.95).all()


def test_ssim_of_several_channels_is_their_mean():
    a, b = pictures(2, 14, 14, channels=3), pictures(2, 14, 14, seed=1, channels=3)
    each = torch.stack([ssim(a[:, i : i + 1], b[:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(a, b), each.mean(0))


def test_ssim_is_one_for_equal_images_and_less_for_others():
    a = pictures(3)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert ssim(a, 255 - a).max() < 0 < ssim(a, (a // 2 + 60)).min() < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_in_pairs_must_be_bytes_of_one_shape(metric):
    a = pictures(2)
    for other in (a.float(), a.float() / 127.5 - 1, a.long(), pictures(3), pictures(2, 28, 27)):
        for pair in ((a, other), (other, a)):
            with pytest.raises(ValueError) as error:
                metric(*pair)
            for given in pair:
                assert str(given.dtype) in str(error.value) and str(tuple(given.shape)) in str(error.value)


# --- Frechet distance ------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_two_diagonal_gaussians_is_its_closed_form():
    m1, m2 = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.5, 0.0, 3.0]).double()
    v1, v2 = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([4.0, 1.0, 0.5]).double()
    expected = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    a, b = with_moments(m1, v1.diag(), 40), with_moments(m2, v2.diag(), 60, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)  # with n for n - 1 it would be 1 % off


def test_the_frechet_distance_does_not_change_with_a_rotation_of_both_sets():
    v1, v2 = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([4.0, 1.0, 0.5]).double()
    m = torch.tensor([0.5, 0.0, -1.0]).double()
    expected = m.square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    turn = rotation(3)
    a, b = with_moments(0 * m, v1.diag()) @ turn.T, with_moments(m, v2.diag(), seed=1) @ turn.T
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_the_frechet_distance_of_covariances_that_do_not_commute():
    turn, v1, v2 = rotation(4), torch.tensor([9.0, 1.0, 0.5, 0.1]).double(), torch.tensor([4.0, 0.2, 2.0, 1.0]).double()
    c1, c2 = v1.diag(), turn @ v2.diag() @ turn.T
    zero = torch.zeros(4, dtype=torch.float64)
    # tr (C1 C2)^1/2 from the eigenvalues of the product itself, which is not symmetric
    cross = np.sqrt(np.linalg.eigvals((c1 @ c2).numpy()).real).sum()
    expected = v1.sum().item() + v2.sum().item() - 2 * cross
    assert frechet_distance(with_moments(zero, c1), with_moments(zero, c2, seed=1)) == pytest.approx(expected, rel=1e-8)
    assert expected > (v1.sort().values.sqrt() - v2.sort().values.sqrt()).square().sum() + 0.1  # the axes matter


def test_the_frechet_distance_is_symmetric_and_zero_for_equal_sets():
    a, b = normal(40, 5), 1.5 * normal(30, 5, seed=1) + 0.3
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9) and frechet_distance(a, b) > 0.1
    assert 0 <= frechet_distance(a, a) < 1e-10
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-10


def test_a_shift_of_one_set_adds_its_square():
    a, b, shift = normal(40, 5), normal(40, 5, seed=1), torch.tensor([3.0, 0, 0, 0, 4.0]).double()
    b = b - b.mean(0) + a.mean(0)
    assert frechet_distance(a, b + shift) - frechet_distance(a, b) == pytest.approx(25, rel=1e-9)


def test_the_frechet_distance_is_computed_in_float64():
    a, b = normal(500, 6, dtype=torch.float32), normal(500, 6, seed=1, dtype=torch.float32)
    moved = frechet_distance(a * 2.0**-4 + 1000, b * 2.0**-4 + 1000)
    exact = frechet_distance((a * 2.0**-4 + 1000).double() - 1000, (b * 2.0**-4 + 1000).double() - 1000)
    assert moved == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("n, dim", [(30, 1), (5, 12), (2, 3)])
def test_one_feature_or_fewer_samples_than_features_work(n, dim):
    a, b = normal(n, dim), 1 + normal(n, dim, seed=1)
    assert 0 < frechet_distance(a, b) < inf
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_with_fewer_samples_the_frechet_distance_is_larger():
    whole = normal(5000, 16, seed=99)
    values = [np.mean([frechet_distance(normal(n, 16, seed=i), whole) for i in range(3)]) for n in (50, 200, 1000)]
    assert values[0] > 2 * values[1] > 4 * values[2] > 0  # of one distribution with itself: the true distance is zero


# --- KID -------------------------------------------------------------------------------------------------------------


def slow_kid(x, y):
    """The unbiased estimator of the squared MMD with kernel (x.y / d + 1)^3, one pair at a time."""
    def kernel(p, q):
        return (sum(i * j for i, j in zip(p, q)) / len(p) + 1) ** 3

    x, y = x.tolist(), y.tolist()
    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(p, q) for p in x for q in y) / (m * n)


def test_kid_equals_a_slow_double_loop():
    a, b = normal(12, 5), 1.3 * normal(12, 5, seed=1) + 0.4
    mean, spread = kid(a, b, subsets=3)
    assert mean == pytest.approx(slow_kid(a, b), rel=1e-10) and spread < 1e-12  # all subsets are the whole set
    assert kid(b, a)[0] == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize("n, m, size", [(40, 30, 10), (40, 12, 1000), (9, 30, 1000)])
def test_kid_of_subsets_is_the_mean_and_the_spread_of_their_kids(n, m, size):
    a, b = normal(n, 3), normal(m, 3, seed=1) + 0.5
    generator, values = seeded(7), []
    for _ in range(4):
        x, y = (v[torch.randperm(len(v), generator=generator)[: min(n, m, size)]] for v in (a, b))
        values.append(slow_kid(x, y))
    mean, spread = kid(a, b, subsets=4, size=size, seed=7)
    assert mean == pytest.approx(np.mean(values), rel=1e-9) and spread == pytest.approx(np.std(values), rel=1e-9)


def test_kid_of_one_distribution_with_itself_is_zero_on_average():
    values = np.array([kid(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1), subsets=1)[0] for i in range(400)])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 5.5 * error
    assert values.min() < 0  # an unbiased estimate of zero has both signs
    # with the pairs of a point with itself the mean would be 2 E[k(x, x) - k(x, y)] / n above zero
    x, y = normal(2000, 4, seed=1), normal(2000, 4, seed=2)
    bias = 2 * (((x * x).sum(1) / 4 + 1).pow(3).mean() - ((x * y).sum(1) / 4 + 1).pow(3).mean()).item() / 20
    assert bias > 12 * error


def test_kid_is_the_same_each_time_and_larger_for_sets_that_are_further_apart():
    a, b = normal(60, 4), normal(60, 4, seed=1)
    state = torch.get_rng_state()
    assert kid(a, b, 5, 20) == kid(a, b, 5, 20) != kid(a, b, 5, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither used nor moved
    assert kid(a, b)[0] < kid(a, b + 0.5)[0] < kid(a, b + 1)[0]


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def slow_prdc(real, fake, k):
    def distance(p, q):
        return sum((i - j) ** 2 for i, j in zip(p, q)) ** 0.5

    real, fake = real.tolist(), fake.tolist()
    radius_real = [sorted(distance(p, q) for j, q in enumerate(real) if i != j)[k - 1] for i, p in enumerate(real)]
    radius_fake = [sorted(distance(p, q) for j, q in enumerate(fake) if i != j)[k - 1] for i, p in enumerate(fake)]
    inside = [[distance(p, q) < radius for p, radius in zip(real, radius_real)] for q in fake]  # [fake][real]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean([any(distance(p, q) < radius for q, radius in zip(fake, radius_fake)) for p in real]),
        "density": np.mean([sum(row) / k for row in inside]),
        "coverage": np.mean([any(row[i] for row in inside) for i in range(len(real))]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("sizes", [(25, 18), (14, 31)], ids=str)
def test_precision_recall_density_and_coverage_equal_a_slow_loop(k, sizes):
    real, fake = normal(sizes[0], 3), 0.7 * normal(sizes[1], 3, seed=1) + 0.6
    assert prdc(real, fake, k) == pytest.approx(slow_prdc(real, fake, k), rel=1e-12)


def test_more_than_a_thousand_points_give_the_same_as_fewer_at_a_time():
    real, fake = normal(1100, 2), 1.5 * normal(1050, 2, seed=1)
    near_real, near_fake = (torch.cdist(v, v).sort(dim=1).values[:, 5] for v in (real, fake))
    across = torch.cdist(fake, real)
    inside = across < near_real
    found = prdc(real, fake)
    assert found["precision"] == pytest.approx(inside.any(1).double().mean().item(), rel=1e-3)
    assert found["recall"] == pytest.approx((across < near_fake[:, None]).any(0).double().mean().item(), rel=1e-3)
    assert found["density"] == pytest.approx(inside.sum(1).double().mean().item() / 5, rel=1e-3)
    assert found["coverage"] == pytest.approx(inside.any(0).double().mean().item(), rel=1e-3)


def test_equal_sets_are_precise_and_complete():
    a = normal(60, 3)
    found = prdc(a, a)
    assert found.pop("density") == pytest.approx(1, abs=0.03)  # rounding decides on the k-th, at the edge
    assert found == {"precision": 1, "recall": 1, "coverage": 1}


def test_sets_far_apart_are_neither():
    found = prdc(normal(60, 3), normal(50, 3, seed=1) + 100)
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_samples_of_one_mode_out_of_two_are_precise_but_cover_half():
    left, right = normal(100, 2), normal(100, 2, seed=1) + 50
    found = prdc(torch.cat([left, right]), normal(100, 2, seed=2))
    assert found["precision"] > 0.8 and found["recall"] < 0.5 and found["coverage"] <= 0.5
    swapped = prdc(normal(100, 2, seed=2), torch.cat([left, right]))  # half of the samples are nothing real
    assert swapped["precision"] <= 0.5 and swapped["recall"] > 0.8 and swapped["coverage"] > 0.8


def test_a_set_needs_more_points_than_neighbours():
    a = normal(6, 3)
    assert set(prdc(a, a, k=5)) == {"precision", "recall", "density", "coverage"}
    with pytest.raises(ValueError, match="at least 6.*5"):
        prdc(normal(5, 3), a, k=5)


# --- what features must be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [frechet_distance, kid, prdc])
@pytest.mark.parametrize("bad", [float("nan"), inf])
def test_features_that_are_not_finite_are_refused(metric, bad):
    a, b = normal(20, 3), normal(20, 3)
    b[7, 1] = bad
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            metric(*pair)


@pytest.mark.parametrize("metric", [frechet_distance, kid, prdc])
def test_features_of_a_wrong_shape_are_refused_with_both_shapes(metric):
    for a, b in ((normal(20, 3), normal(20, 4)), (normal(20, 3), normal(20, 3, 1)), (normal(20), normal(20))):
        with pytest.raises(ValueError) as error:
            metric(a, b)
        assert str(tuple(a.shape)) in str(error.value) and str(tuple(b.shape)) in str(error.value)


@pytest.mark.parametrize("metric", [frechet_distance, kid])
def test_one_sample_is_no_distribution(metric):
    with pytest.raises(ValueError, match="at least 2.*1 and 20"):
        metric(normal(1, 3), normal(20, 3))


# --- neighbours and memorisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 500])
def test_the_nearest_training_image_is_found_and_its_distance_is_the_root_mean_square(batch):
    images, train = pictures(9, 8, 10), pictures(30, 8, 10, seed=1)
    distance, place = nearest_distance(images, train, batch)
    table = ((images[:, None].double() - train[None].double()) / 255).square().flatten(2).mean(2).sqrt()
    assert place.tolist() == table.argmin(1).tolist()
    torch.testing.assert_close(distance.double(), table.amin(1), atol=1e-4, rtol=0)


def test_black_and_white_lie_at_distance_one():
    black, white = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    assert nearest_distance(black, white)[0].item() == pytest.approx(1, abs=1e-6)


def test_copied_training_images_give_a_memorisation_of_zero_and_new_images_one():
    train, test, new = (pictures(40, seed=seed) for seed in range(3))
    assert 0 <= memorisation(train[10:30], test, train) < 0.01
    assert memorisation(test, test, train) == pytest.approx(1)
    assert memorisation(new, test, train) == pytest.approx(1, abs=0.05)
    half = torch.cat([train[:20], new[:20]])
    assert memorisation(half, test, train) == pytest.approx(0.5, abs=0.05)


def test_a_copied_training_image_finds_itself():
    train = pictures(40)
    distance, place = nearest_distance(train[7:12], train)
    assert place.tolist() == [7, 8, 9, 10, 11] and distance.max() < 1e-3


def test_images_that_are_no_bytes_have_no_nearest_training_image():
    images = pictures(4)
    for a, b in ((images.float() / 127.5 - 1, images), (images, images.float()), (images, pictures(4, 28, 27))):
        with pytest.raises(ValueError, match="uint8"):
            nearest_distance(a, b)


# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(channels=(8, 8, 12))).eval()


@torch.no_grad()
def test_the_features_are_the_means_of_the_last_channels_and_the_logits_come_from_them(classifier):
    x = normal(3, 1, 28, 28, dtype=torch.float32)
    features = classifier.features(x)
    assert features.shape == (3, 12)
    torch.testing.assert_close(features, classifier.layers(x).flatten(2).mean(2))
    assert torch.equal(classifier(x), classifier.head(features)) and classifier(x).shape == (3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier.features(x).dtype == torch.float32


@torch.no_grad()
def test_the_features_of_an_image_depend_on_it_alone(classifier):
    x = normal(4, 1, 28, 28, dtype=torch.float32)
    together = classifier.train().features(x)
    for i in range(4):
        torch.testing.assert_close(classifier.eval().features(x[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5)


class Recorder(nn.Module):
    """Stands for a classifier: keeps what it is shown, and gives logits that are the ids themselves."""

    def forward(self, x):
        self.seen = x
        return torch.arange(10.0).expand(len(x), 10)


def test_the_classifier_is_shown_images_moved_by_up_to_two_pixels_and_never_mirrored():
    x = (torch.rand(2, 1, 6, 6, generator=seeded()) + 0.5).float()
    moved = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            canvas = torch.full((2, 1, 10, 10), -1.0)  # the background is black
            canvas[:, :, 2 + down : 8 + down, 2 + right : 8 + right] = x
            moved[canvas[:, :, 2:8, 2:8].numpy().tobytes()] = (down, right)
    recorder, found = Recorder(), []
    for seed in range(600):
        classifier_loss(recorder, x, torch.tensor([0, 1]), seeded(seed))
        found.append(moved[recorder.seen.contiguous().numpy().tobytes()])  # KeyError: something else than a shift
    assert len(set(found)) == 25  # all of them; one is missing in 600 draws once in 10^9 times


def test_the_classifiers_loss_is_the_cross_entropy_of_each_image():
    x, y = torch.zeros(3, 1, 28, 28), torch.tensor([0, 9, 4])
    total = log(sum(exp(i) for i in range(10)))
    torch.testing.assert_close(classifier_loss(Recorder(), x, y, seeded()), total - y.float())
