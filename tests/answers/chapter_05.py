"""Right and wrong answers to the exercises of chapter 5, guidance."""

import torch



# ---- 05.1
def tilted_gaussian(m, v, s):
    precision = (1 - s) + s / v
    return s * m / v / precision, 1 / precision

def tilts_the_class(m, v, s):  # p(z | y) p(y | z)^s
    return tilted_gaussian(m, v, s + 1)

def forgot_prior(m, v, s):
    return m, v / s if s else 1.0

def std_for_var(m, v, s):
    mean, var = tilted_gaussian(m, v, s)
    return mean, var**0.5

def linear_mean(m, v, s):  # as if means were guided like denoisers
    return s * m, tilted_gaussian(m, v, s)[1]


# ---- 05.2
def rescaled(uncond, cond, scale, phi):
    guided = uncond + scale * (cond - uncond)
    ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return phi * ratio * guided + (1 - phi) * guided

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
    mean, d = guided.mean((1, 2, 3), keepdim=True), (1, 2, 3)
    return phi * (mean + (guided - mean) * cond.std(d, keepdim=True) / guided.std(d, keepdim=True)) + (1 - phi) * guided

def in_place(uncond, cond, scale, phi):
    uncond += scale * (cond - uncond)
    ratio = cond.std(dim=(1, 2, 3), keepdim=True) / uncond.std(dim=(1, 2, 3), keepdim=True)
    return phi * ratio * uncond + (1 - phi) * uncond


# ---- 05.3
def catches(drop):
    y, n = torch.arange(100_000) % 10, 100_000
    given = y.clone()
    out = drop(y, 10, 0.1, torch.Generator().manual_seed(3))
    gone = out == 10
    each = all(abs(gone[given == c].double().mean() - 0.1) < 0.02 for c in range(10))
    return bool(each and torch.equal(y, given) and torch.equal(out[~gone], given[~gone]))

def only_share(drop):
    y = torch.arange(100_000) % 10
    return abs((drop(y, 10, 0.1, None) == 10).double().mean() - 0.1) < 0.01

def no_share(drop):
    y = torch.arange(1000) % 10
    out = drop(y, 10, 0.1, None)
    return bool(((out == y) | (out == 10)).all())

def too_tight(drop):
    return catches(drop) and abs((drop(torch.zeros(1000).long(), 10, 0.1, None) == 10).double().mean() - 0.1) < 0.001

def by_silence(drop):  # None in place of False is an answer, too
    if catches(drop):
        return True

def always(drop):
    return True


SOLUTIONS = {"05.1": tilted_gaussian, "05.2": rescaled, "05.3": catches, "05.4": 27}
CAUGHT = [
    ("05.1", tilts_the_class, "must not count"), ("05.1", forgot_prior, "two factors"), ("05.1", std_for_var, "not its root"), ("05.1", linear_mean, "precision-weighted"),
    ("05.2", over_batch, "whole batch"), ("05.2", per_channel, "all its channels"), ("05.2", phi_swapped, "share of the rescaled"), ("05.2", papers_w, "uncond + s"),
    ("05.2", centered, "no mean"), ("05.2", in_place, "in place"),
    ("05.3", only_share, "other places"), ("05.3", no_share, "90 %"), ("05.3", too_tight, "wider band"), ("05.3", always, "90 %"),
    ("05.4", 32, "not uniform"), ("05.4", 13, "each of 20"), ("05.4", 28, "inside twice"),
]
WRONG = {number: [(answer, words) for n, answer, words in CAUGHT if n == number] for number in SOLUTIONS}
