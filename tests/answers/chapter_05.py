"""Wrong answers to the exercises of chapter 5, guidance, and other right ones."""

import torch
from coursework import solution

from ldm_minimal.guidance import guide

tilted_gaussian, rescaled, catches, repairing_scale = (solution(number) for number in ("05.1", "05.2", "05.3", "05.4"))
guide_over_time, of_mean = solution("05.7")


# ---- 05.1
def tilts_the_class(m, v, s):  # p(z | y) p(y | z)^s
    return tilted_gaussian(m, v, s + 1)

def forgot_prior(m, v, s):
    return m, v / s

def std_for_var(m, v, s):
    mean, var = tilted_gaussian(m, v, s)
    return mean, var**0.5

def linear_mean(m, v, s):  # as if means were guided like denoisers
    return s * m, tilted_gaussian(m, v, s)[1]

def linear_variance(m, v, s):
    return tilted_gaussian(m, v, s)[0], (1 - s) + s * v

def exchanged(m, v, s):
    return tilted_gaussian(m, v, s)[::-1]

def mean_not_normalized(m, v, s):
    return s * m / (s + (1 - s)), tilted_gaussian(m, v, s)[1]

def only_mean(m, v, s):
    return tilted_gaussian(m, v, s)[0]

def by_tensors(m, v, s):  # float32, and through v / s
    m, v, s = (torch.tensor(float(x)) for x in (m, v, s))
    precision = 1 / (v / s) + (1 - s)
    return [(1 / precision) * m / (v / s), 1 / precision]

def over_v(m, v, s):
    return s * m / (v + s * (1 - v)), v / (v + s * (1 - v))


# ---- 05.2
D = (1, 2, 3)

def over_batch(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    return phi * guided * cond.std() / guided.std() + (1 - phi) * guided

def per_channel(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    return phi * guided * cond.std((2, 3), keepdim=True) / guided.std((2, 3), keepdim=True) + (1 - phi) * guided

def phi_swapped(uncond, cond, scale, phi):
    return rescaled(uncond, cond, scale, 1 - phi)

def papers_w(uncond, cond, scale, phi):
    return rescaled(uncond, cond, scale + 1, phi)

def centered(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    mean = guided.mean(D, keepdim=True)
    ratio = cond.std(D, keepdim=True) / guided.std(D, keepdim=True)
    return phi * (mean + (guided - mean) * ratio) + (1 - phi) * guided

def in_place(uncond, cond, scale, phi):
    uncond += scale * (cond - uncond)
    ratio = cond.std(dim=D, keepdim=True) / uncond.std(dim=D, keepdim=True)
    return phi * ratio * uncond + (1 - phi) * uncond

def like_uncond(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    return phi * guided * uncond.std(D, keepdim=True) / guided.std(D, keepdim=True) + (1 - phi) * guided

def ratio_of_variances(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    return phi * guided * cond.var(D, keepdim=True) / guided.var(D, keepdim=True) + (1 - phi) * guided

def mixed_with_cond(uncond, cond, scale, phi):
    return rescaled(uncond, cond, scale, 1.0) * phi + (1 - phi) * cond

def ratio_mixed(uncond, cond, scale, phi):  # the geometric mixture
    guided = uncond + scale * (cond - uncond)
    return guided * (cond.std(D, keepdim=True) / guided.std(D, keepdim=True)) ** phi

def by_the_ratio(uncond, cond, scale, phi):
    guided = torch.lerp(uncond, cond, scale)
    ratio = cond.flatten(1).std(1, correction=0) / guided.flatten(1).std(1, correction=0)
    return guided * (1 + phi * (ratio - 1)).view(-1, 1, 1, 1)

def sample_by_sample(uncond, cond, scale, phi):
    made = []
    for u, c in zip(uncond.double(), cond.double()):
        g = (1 - scale) * u + scale * c
        made.append(torch.lerp(g, g * c.std() / g.std(), phi))
    return torch.stack(made).float()


# ---- 05.3
def only_share(drop):
    y = torch.arange(100_000) % 10
    return abs((drop(y, 10, 0.1, None) == 10).double().mean() - 0.1) < 0.01

def no_share(drop):
    y = torch.arange(1000) % 10
    out = drop(y, 10, 0.1, None)
    return bool(((out == y) | (out == 10)).all())

def too_tight(drop):
    return catches(drop) and abs((drop(torch.zeros(1000).long(), 10, 0.1, None) == 10).double().mean() - 0.1) < 0.001

def always(drop):
    return True

def one_half(drop):  # where > and < are the same
    y = torch.arange(100_000) % 10
    out = drop(y.clone(), 10, 0.5, None)
    return all(abs((out[y == c] == 10).double().mean() - 0.5) < 0.05 for c in range(10))

def many_small_batches(drop):
    y = torch.arange(100) % 10
    outs = torch.stack([drop(y, 10, 0.1, None) for _ in range(1000)])
    return bool(all(abs((outs[:, y == c] == 10).double().mean() - 0.1) < 0.03 for c in range(10))
                and ((outs == y) | (outs == 10)).all())

def protects_the_input(drop):
    y = torch.arange(100_000) % 10
    out = drop(y.clone(), 10, 0.1, None)
    return all(abs((out[y == c] == 10).double().mean() - 0.1) < 0.02 for c in range(10)) and bool(
        ((out == y) | (out == 10)).all())

def compares_with_itself(drop):  # no clone: what was overwritten is not seen
    y = torch.arange(100_000) % 10
    classes = y.clone()
    out = drop(y, 10, 0.1, None)
    kept = out != 10
    return all(abs((~kept)[classes == c].double().mean() - 0.1) < 0.02 for c in range(10)) and bool(
        (out == y)[kept].all())

def shares_alone(drop):
    y = torch.arange(100_000) % 10
    out = drop(y.clone(), 10, 0.1, None)
    return all(abs((out == c).double().mean() - 0.09) < 0.01 for c in range(10))

def the_authors_numbers(drop):  # the same as one way of throwing the coin
    y = torch.arange(1000) % 10
    out = drop(y, 10, 0.1, torch.Generator().manual_seed(0))
    coins = torch.rand(y.shape, generator=torch.Generator().manual_seed(0))
    return torch.equal(out, torch.where(coins < 0.1, 10, y))

def silent_asserts(drop):
    assert catches(drop)

def by_silence(drop):  # None in place of False is an answer, too
    if catches(drop):
        return True

def by_asserts(drop):
    y = torch.arange(100_000) % 10
    given = y.clone()
    out = drop(y, 10, 0.1, None)
    torch.testing.assert_close(y, given)
    gone = out == 10
    torch.testing.assert_close(out[~gone], given[~gone])
    for c in range(10):
        assert abs(gone[given == c].double().mean() - 0.1) < 0.02, c
    return True

def several_shares(drop):  # other labels, another null, keywords, no generator; bands of five standard errors
    n, null = 40_000, 3
    for share in (0.0, 0.05, 0.3, 0.9, 1.0):
        y = 4 + torch.arange(n) // 10_000
        out = drop(y=y, null=null, share=share)
        if not torch.equal(y, 4 + torch.arange(n) // 10_000) or out.dtype != y.dtype or out.shape != y.shape:
            return False
        if not bool(((out == y) | (out == null)).all()):
            return False
        band = 5 * (share * (1 - share) / 10_000) ** 0.5
        if any(abs(float((out[y == c] == null).double().mean()) - share) > band for c in range(4, 8)):
            return False
    return True

def by_chi_square(drop):
    y = torch.randint(0, 10, (50_000,), generator=torch.Generator().manual_seed(5))
    seen, expected = y.clone(), 0.1 * torch.bincount(y, minlength=10)
    generator = torch.Generator().manual_seed(6)
    out = drop(seen, -1, 0.1, generator)
    hidden = torch.bincount(y[out == -1], minlength=10)
    chi = ((hidden - expected) ** 2 / (0.9 * expected)).sum()
    return bool(chi < 60 and (seen == y).all() and (out[out != -1] == y[out != -1]).all())


# ---- 05.4
def k(alpha, sigma, u):
    return alpha * u / (alpha**2 * u + sigma**2)

def from_the_estimates(alpha, sigma, v, a, b):
    ideal, good, weak = (k(alpha, sigma, u) for u in (v, a * v, b * v))
    return (ideal - weak) / (good - weak)

def by_the_ratio_of_errors(alpha, sigma, v, a, b):
    r = (a - 1) * (alpha**2 * b * v + sigma**2) / ((b - 1) * (alpha**2 * a * v + sigma**2))
    return 1 / (1 - r)

def number_by_number(alpha, sigma, v, a, b):
    return torch.stack([repairing_scale(one, other, v, a, b) for one, other in zip(alpha, sigma)])

def papers_weight(alpha, sigma, v, a, b):
    return repairing_scale(alpha, sigma, v, a, b) - 1

def good_for_weak(alpha, sigma, v, a, b):
    return repairing_scale(alpha, sigma, v, b, a)

def upside_down(alpha, sigma, v, a, b):
    return 1 / repairing_scale(alpha, sigma, v, a, b)

def weak_denominator(alpha, sigma, v, a, b):
    return (b - 1) * (alpha**2 * b * v + sigma**2) / ((b - a) * (alpha**2 * v + sigma**2))

def at_pure_noise(alpha, sigma, v, a, b):
    return (b - 1) / (b - a)

def at_the_data(alpha, sigma, v, a, b):
    return torch.full_like(alpha, a * (b - 1) / (b - a))

def by_variances(alpha, sigma, v, a, b):  # of z_t, in place of the estimates
    return (alpha**2 * (b - 1) * v + sigma**2) / (alpha**2 * (b - a) * v + sigma**2)

def at_least_one(alpha, sigma, v, a, b):
    return repairing_scale(alpha, sigma, v, a, b).clamp(min=1)


# ---- 05.7
def batched(zt, t, y, denoise, null):
    both = denoise(torch.cat([zt, zt]), torch.cat([t, t]), torch.cat([torch.full_like(y, null), y]))
    return both.chunk(2)

def rule(combine):
    """A wrong `guide_over_time` from what it does with (uncond, cond, scale(t))."""
    def made(denoise, null, scale):
        def guided(zt, t, y):
            return combine(*batched(zt, t, y, denoise, null), scale(t).to(zt).reshape(-1, 1, 1, 1))
        return guided
    return made, of_mean

def without_reshape(denoise, null, scale):
    def guided(zt, t, y):
        uncond, cond = batched(zt, t, y, denoise, null)
        return uncond + scale(t).to(zt) * (cond - uncond)
    return guided

def becomes_float64(denoise, null, scale):
    def guided(zt, t, y):
        uncond, cond = batched(zt, t, y, denoise, null)
        return uncond + scale(t)[:, None, None, None] * (cond - uncond)
    return guided

def first_of_the_batch(denoise, null, scale):
    def guided(zt, t, y):
        uncond, cond = batched(zt, t, y, denoise, null)
        return uncond + float(scale(t)[0]) * (cond - uncond)
    return guided

def scale_of_the_mean_time(denoise, null, scale):
    def guided(zt, t, y):
        uncond, cond = batched(zt, t, y, denoise, null)
        return uncond + float(scale(t.mean())) * (cond - uncond)
    return guided

def any_for_all(denoise, null, scale):
    def guided(zt, t, y):
        if (scale(t) == 1).any():
            return denoise(zt, t, y)
        return guide_over_time(denoise, null, scale)(zt, t, y)
    return guided

def overwrites_labels(denoise, null, scale):
    def guided(zt, t, y):
        cond = denoise(zt, t, y)
        uncond = denoise(zt, t, y.fill_(null))
        return uncond + scale(t).to(zt).reshape(-1, 1, 1, 1) * (cond - uncond)
    return guided

def null_is_zero(denoise, null, scale):
    return guide_over_time(denoise, 0, scale)

def forgot_times(denoise, null, scale):
    def guided(zt, t, y):
        both = denoise(torch.cat([zt, zt]), t, torch.cat([torch.full_like(y, null), y]))
        uncond, cond = both.chunk(2)
        return uncond + scale(t).to(zt).reshape(-1, 1, 1, 1) * (cond - uncond)
    return guided

def asks_thrice(denoise, null, scale):
    def guided(zt, t, y):
        nothing = torch.full_like(y, null)
        s = scale(t).to(zt).reshape(-1, 1, 1, 1)
        return denoise(zt, t, nothing) + s * (denoise(zt, t, y) - denoise(zt, t, nothing))
    return guided

def floor_at_one(denoise, null, scale):
    return guide_over_time(denoise, null, lambda t: scale(t).clamp(min=1))

def interleaved(denoise, null, scale):  # cat gives all of one kind first
    def guided(zt, t, y):
        both = denoise(torch.cat([zt, zt]), torch.cat([t, t]), torch.cat([torch.full_like(y, null), y]))
        return both[::2] + scale(t).to(zt).reshape(-1, 1, 1, 1) * (both[1::2] - both[::2])
    return guided

def mean_over_all_t(shape, times, mean):
    c = mean / float(shape(torch.linspace(0, 1, 1001, dtype=torch.float64)).mean())
    return lambda t: 1 + c * shape(t)

def mean_of_s(shape, times, mean):
    c = (mean - 1) / float(shape(times).mean())
    return lambda t: 1 + c * shape(t)

def mean_without_the_last(shape, times, mean):
    return of_mean(shape, times[:-1], mean)

def mean_of_each_call(shape, times, mean):
    return lambda t: 1 + mean * shape(t) / shape(t).mean()

def multiplied(shape, times, mean):
    return lambda t: (1 + mean) * shape(t) / shape(times).mean()

def largest(shape, times, mean):
    return lambda t: 1 + mean * shape(t) / shape(times).max()

def two_calls(denoise, null, scale):  # no short cut, no common batch
    def guided(zt, t, y):
        s = scale(t)[:, None, None, None].to(zt.dtype)
        return s * denoise(zt, t, y) + (1 - s) * denoise(zt, t, torch.full(y.shape, null))
    return guided

def one_at_a_time(denoise, null, scale):
    def guided(zt, t, y):
        made = []
        for i in range(len(zt)):
            one = slice(i, i + 1)
            s, cond = float(scale(t[one])), denoise(zt[one], t[one], y[one])
            made.append(cond if s == 1 else torch.lerp(denoise(zt[one], t[one], 0 * y[one] + null), cond, s))
        return torch.cat(made)
    return guided

def in_float32(shape, times, mean):
    total = sum(float(shape(t[None])) for t in times)
    return lambda t: 1 + torch.tensor(mean * len(times) / total) * shape(t.float())


ALSO_RIGHT = [
    ("05.1", by_tensors), ("05.1", over_v),
    ("05.2", by_the_ratio), ("05.2", sample_by_sample),
    ("05.3", by_silence), ("05.3", by_asserts), ("05.3", several_shares), ("05.3", by_chi_square),
    ("05.4", by_the_ratio_of_errors), ("05.4", number_by_number),
    ("05.7", (two_calls, in_float32)), ("05.7", (one_at_a_time, of_mean)), ("05.7", (guide, of_mean)),
]
WRONG = {
    "05.1": [(tilts_the_class, "must not count"), (forgot_prior, "two factors"), (std_for_var, "not its root"),
             (linear_mean, "precision-weighted"), (linear_variance, "precisions"), (exchanged, "are exchanged"),
             (mean_not_normalized, "precision-weighted|must not count"), (only_mean, "return mean and variance")],
    "05.2": [(over_batch, "whole batch"), (per_channel, "all its channels"), (phi_swapped, "share of the rescaled"),
             (papers_w, "scale + 1"), (centered, "no mean"), (in_place, "in place"), (like_uncond, "std(cond)"),
             (ratio_of_variances, "std(cond)"), (mixed_with_cond, "nothing is rescaled"), (ratio_mixed, "phi times")],
    "05.3": [(only_share, "other places"), (no_share, "nothing was dropped|1 - share"), (too_tight, "wider band"),
             (always, "1 - share"), (one_half, "one half"), (many_small_batches, "draw once"),
             (protects_the_input, "overwritten"), (compares_with_itself, "overwritten"), (shares_alone, "other places"),
             (the_authors_numbers, "more than one way"), (silent_asserts, "return True")],
    "05.4": [(papers_weight, "s - 1"), (good_for_weak, "exchanged"), (at_pure_noise, "limit t -> 1"), (upside_down, "1 / s"),
             (weak_denominator, "other way round"), (from_the_estimates, "0/0"),
             (at_the_data, "set k(bv)"), (by_variances, "set k(bv)"), (at_least_one, "turned round")],
    "05.7": [(rule(lambda uncond, cond, s: cond + s * (cond - uncond)), "w taken for s"),
             (rule(lambda uncond, cond, s: cond + s * (uncond - cond)), "exchanged"),
             (rule(lambda uncond, cond, s: uncond + s * cond), "uncond + s (cond - uncond)"),
             ((without_reshape, of_mean), "met the width"), ((becomes_float64, of_mean), "float64"),
             ((first_of_the_batch, of_mean), "whole batch"), ((scale_of_the_mean_time, of_mean), "whole batch"),
             ((any_for_all, of_mean), ".all()"), ((overwrites_labels, of_mean), "in place"),
             ((null_is_zero, of_mean), "at label null"), ((forgot_times, of_mean), "latents"),
             ((asks_thrice, of_mean), "at most twice"), ((floor_at_one, of_mean), "at s = 0"),
             ((interleaved, of_mean), "uncond + s"),
             ((guide_over_time, mean_over_all_t), "not uniform"), ((guide_over_time, mean_of_s), "mean of s"),
             ((guide_over_time, mean_without_the_last), "not uniform"),
             ((guide_over_time, mean_of_each_call), "found once"),
             ((guide_over_time, multiplied), "mean asked for|no guidance"),
             ((guide_over_time, largest), "not uniform")],
}
