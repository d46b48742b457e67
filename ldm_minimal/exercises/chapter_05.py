"""Checks of the exercises of chapter 5: guidance."""

import torch
from torch import Tensor

from ..checks import NotDone, Stopped, close, cosine, exercise, generator, integer, noise, uniform


@exercise("05.1", "the tilted Gaussian", points=2)
def _(tilted_gaussian):
    grid = torch.linspace(-20, 20, 8001, dtype=torch.float64)
    ms, vs, ss = uniform(0.5, 1.5, 4, seed=1), uniform(0.3, 0.7, 4, seed=2), uniform(2.0, 4.0, 4, seed=3)
    cases = [(m * sign, v, s) for m, v, s, sign in zip(ms.tolist(), vs.tolist(), ss.tolist(), (1, -1, 1, -1))]
    m, v, _ = cases.pop()
    cases.append((m, v, 0.5))

    def truth(m, v, s):  # logarithms of the two factors, up to constants, summed on the grid
        p = (-(1 - s) * grid**2 / 2 - s * (grid - m) ** 2 / (2 * v)).softmax(0)
        mean = float((p * grid).sum())
        return mean, float((p * (grid - mean) ** 2).sum())

    def answer(m, v, s):
        got = tilted_gaussian(m, v, s)
        return tuple(map(float, got)) if isinstance(got, (tuple, list)) and len(got) == 2 else None

    none = answer(m, v, 1e-9)  # almost 0: at 0 itself a fair intermediate step, v / s, would fail
    yield "two numbers come back", none is not None, "return mean and variance: `return mean, variance`"
    yield ("s = 0 gives the prior, N(0, 1)", close(none[0], 0.0) and close(none[1], 1.0),
           "mean and variance are exchanged" if close(none[0], 1.0) and close(none[1], 0.0) else
           "at s = 0 the label must not count: of the two factors p(z)^(1 - s) and p(z | y)^s only the prior is left")
    mean, var = answer(m, v, 1.0)
    yield ("s = 1 gives the class, N(m, v)", close(mean, m) and close(var, v),
           "the second number should be the variance, not its root" if close(var, v**0.5) else
           "at s = 1 it is Bayes' rule itself: p(z) p(y | z) is proportional to p(z | y)")
    pairs = [(answer(*case), truth(*case)) for case in cases]
    yield ("the variance is that of the product, summed on a grid",
           all(close(got[1], wanted[1], rtol=1e-3) for got, wanted in pairs),
           "precisions (1 / variance) add up: 1 - s times that of the prior, s times that of the class")
    yield ("the mean is that of the product, summed on a grid",
           all(close(got[0], wanted[0], rtol=1e-3) for got, wanted in pairs),
           "the mean is the precision-weighted one: s m / v divided by the new precision")


@exercise("05.2", "rescaled guidance", points=2)
def _(rescaled):
    shape = (3, integer(4, 6, seed=1), 5, 7)
    scale, phi = float(uniform(2.0, 4.0, seed=2)), float(uniform(0.6, 0.8, seed=3))
    sizes = torch.tensor([0.5, 1.0, 3.0]).reshape(-1, 1, 1, 1) * torch.linspace(0.5, 1.5, shape[1]).reshape(-1, 1, 1)
    uncond, cond = 0.5 + 2.0 * noise(*shape, seed=4), (noise(*shape, seed=5) - 0.3) * sizes
    before = uncond.clone(), cond.clone()
    plain = uncond + scale * (cond - uncond)

    def spread(x: Tensor) -> Tensor:
        return x.flatten(1).std(1)

    got = rescaled(uncond, cond, scale, 0.0)
    yield ("the arguments are as they were", torch.equal(uncond, before[0]) and torch.equal(cond, before[1]),
           "an operation in place (+=, mul_, ...) has changed an argument")
    yield "it keeps the shape", got.shape == cond.shape, f"expected {tuple(cond.shape)}, got {tuple(got.shape)}"
    papers = close(got, plain + cond - uncond)
    yield ("phi = 0 is guidance as it was", close(got, plain),
           "that is scale + 1: 2207.12598 writes w = s - 1 and lengthens from cond; here uncond + s (cond - uncond)" if papers
           else "at phi = 0 nothing is rescaled: uncond + s (cond - uncond); is phi the share of the rescaled one?")
    got = rescaled(uncond, cond, scale, 1.0)
    whole = plain * (cond.std() / plain.std())
    yield ("phi = 1 gives each sample the standard deviation of its own conditional estimate",
           close(spread(got), spread(cond), rtol=1e-3),
           "one ratio for the whole batch makes a sample depend on its neighbors: take the std over dims (1, 2, 3) only"
           if close(got, whole, rtol=1e-3) else
           "multiply by std(cond) / std(guided), each over all values of one sample and of all its channels together")
    ratio = (spread(cond) / spread(plain)).reshape(-1, 1, 1, 1)
    yield ("rescaling multiplies and does nothing else", close(got, plain * ratio, rtol=1e-3),
           "no mean is taken out before, and none put back: guided * std(cond) / std(guided)")
    mixture = (phi * ratio + 1 - phi) * plain
    yield (f"phi = {phi:.2f} is a mixture of both", close(rescaled(uncond, cond, scale, phi), mixture, rtol=1e-3),
           "phi times the rescaled estimate plus 1 - phi times the plain one")
    yield ("scale 1 is the conditional estimate at any phi", close(rescaled(uncond, cond, 1.0, phi), cond),
           "at s = 1 guided is cond and the ratio is 1")


@exercise("05.3", "a test that catches", points=3)
def _(drops_right):
    spare = generator(1)  # for a test that gives no generator

    def drop_by(rule):
        """A function to be tested. rule: labels, null label, share, a coin: like -> numbers in [0, 1)."""
        def drop(y, null, share, generator=None):
            return rule(y, null, share, lambda like: torch.rand(like.shape, generator=generator or spare))
        return drop

    def accepts(drop) -> bool:
        try:
            return bool(drops_right(drop))
        except Stopped:
            raise
        except Exception:  # a test may also complain by an assert, or by returning nothing
            return False

    right = (drop_by(lambda y, null, share, coin: torch.where(coin(y) < share, null, y)),
             drop_by(lambda y, null, share, coin: torch.where(coin(y) >= 1 - share, null, y)))
    wrong = [
        (lambda y, null, share, coin: torch.where(coin(y) > share, null, y), "a reversed inequality",
         "1 - share dropped passed: compare the share of nulls with the share asked for, and do not ask for one half"),
        (lambda y, null, share, coin: y.clone(), "no dropout at all", "nothing was dropped, and it passed"),
        (lambda y, null, share, coin: torch.where(coin(y) < share, null - 1, y), "a wrong null label",
         "dropped labels became null - 1: count the nulls, and see that no other label has changed"),
        (lambda y, null, share, coin: torch.where(coin(y[:1]) < share, null, y), "one coin for the whole batch",
         "all or nothing passed: draw once with very many labels, not many times with the mean taken"),
        (lambda y, null, share, coin: torch.where(coin(y) < share, null, y[coin(y).argsort()]),
         "a shuffle of the labels",
         "the labels that were kept stand at other places: compare them with the input where they are no null"),
        (lambda y, null, share, coin: torch.where((coin(y) < 2 * share) & (y % 2 == 0), null, y),
         "a coin that looks at the label",
         "the share was right over all and wrong in each class: look at the classes one by one"),
        (lambda y, null, share, coin: y.masked_fill_(coin(y) < share, null), "a change of the input",
         "the labels given were overwritten, so the next epoch has fewer: keep a clone and compare"),
    ]
    try:
        drops_right(right[0])  # an error in the test itself is shown as it is
    except AssertionError:
        pass  # a verdict, counted below
    except NotDone:
        try:
            drops_right(drop_by(wrong[1][0]))
        except AssertionError:  # no stub: it works by asserts alone
            yield "a right function gets True", False, "nothing came back: end the test with `return True`"
        raise
    # One slip in ten is forgiven, so that bands of four standard errors pass (with 11 comparisons they slip less than
    # once in 1,000 calls; twice in ten calls, once in 30,000), and bands of five pass always.
    yield ("right functions pass, ten times each", all(sum(accepts(drop) for _ in range(10)) >= 9 for drop in right),
           "it turned a right one away: take more labels or a wider band, say five times sqrt(share (1 - share) / n), "
           "and ask for no exact numbers: a coin may be thrown in more than one way")
    for rule, what, mistake in wrong:
        yield f"{what} is caught", not any(accepts(drop_by(rule)) for _ in range(2)), mistake


@exercise("05.4", "the scale that repairs", points=2)
def _(repairing_scale):
    v, a, b = (float(uniform(low, high, seed=i)) for i, (low, high) in enumerate(((0.1, 0.5), (1.3, 1.7), (2.2, 3.0)), 1))
    alpha, sigma = cosine(torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64))
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def variance(ratio: float) -> Tensor:  # of z_t
        return alpha**2 * ratio * v + sigma**2

    def k(ratio: float) -> Tensor:  # the best estimate of z0 is k z_t
        return alpha * ratio * v / variance(ratio)

    def right(a: float, b: float) -> Tensor:
        return (k(1) - k(b)) / (k(a) - k(b))

    def answer(a: float, b: float, alpha: Tensor = alpha, sigma: Tensor = sigma) -> Tensor:
        return torch.as_tensor(repairing_scale(alpha, sigma, v, a, b), dtype=torch.float64).expand_as(alpha)

    got = answer(a, b)
    yield "weak + s (good - weak) is the ideal estimate, at six times", close(got, right(a, b)), (
        "that is s - 1, the w of classifier-free guidance's paper" if close(got + 1, right(a, b)) else
        "that is 1 / s" if close(got * right(a, b), torch.ones_like(got)) else
        "good and weak are exchanged: that is 1 - s" if close(1 - got, right(a, b)) else
        "that is the limit t -> 1: the ratio of the two errors depends on t" if close(got, (b - 1) / (b - a)) else
        "the good denoiser's denominator stays, and the weak one's cancels: you have that the other way round"
        if close(got, right(a, b) * variance(b) / variance(a)) else
        "set k(bv) + s (k(av) - k(bv)) = k(v), with k(u) = alpha u / (alpha^2 u + sigma^2)")
    yield "errors in opposite directions", close(answer(a, 0.5), right(a, 0.5)), (
        "the same formula holds for b < 1: s lies between 0 and 1, and is not to be clamped or turned round")
    yield "its limits at t = 0 and t = 1", close(answer(a, b, ends, 1 - ends), (b - 1) / (b - a) * torch.tensor([a, 1.0], dtype=torch.float64)), (
        "there the three estimates coincide, and their quotient is 0/0: cancel alpha sigma^2 before you code it")


@exercise("05.7", "guidance over time", points=3)
def _(guide_over_time, of_mean):
    B, null = 5, integer(6, 12, seed=1)
    zt, y = noise(B, 3, 4, B, seed=2), torch.tensor([integer(0, null - 1, seed=30 + i) for i in range(B)])
    t = (torch.tensor([3, 0, 4, 2, 1]) + uniform(0.2, 0.8, B, seed=4).double()) / B  # one in each fifth of (0, 1)
    table, rows = 1 + torch.arange(null + 1) + uniform(0.0, 0.5, null + 1, seed=5), []

    def like_zt(numbers: Tensor) -> Tensor:
        return numbers.to(zt).reshape(-1, 1, 1, 1)

    def denoise(zt, t, y):  # some function of all three, another one for each label
        if not len(zt) == len(t) == len(y):
            raise ValueError(f"the denoiser got {len(zt)} latents, {len(t)} times and {len(y)} labels")
        rows.append(len(zt))
        return (zt + like_zt(t)) * like_zt(table[y])

    def guided(scale):
        return guide_over_time(denoise, null, scale)(zt, t, y)

    cond, uncond = denoise(zt, t, y), denoise(zt, t, torch.full_like(y, null))
    before, (s, low, slope) = [each.clone() for each in (zt, t, y)], uniform(2.0, 4.0, 3, seed=6).tolist()
    rows.clear()
    got = guided(lambda t: torch.full_like(t, s))
    yield "zt, t and y are as they were", all(map(torch.equal, (zt, t, y), before)), (
        "one was changed in place: the unconditional half needs labels of its own, torch.full_like(y, null)")
    yield "the shape stays", got.shape == zt.shape, f"{tuple(zt.shape)} became {tuple(got.shape)}"
    yield "float32 stays float32", got.dtype == zt.dtype, (
        f"it became {got.dtype}: t and so scale(t) are float64, and lift what they multiply; .to(zt) brings them down")
    yield "each sample went through the denoiser at most twice", sum(rows) <= 2 * B, (
        f"{sum(rows)} rows for {B} samples: one evaluation with the label and one with null will do")
    yield "a constant scale is the chapter's guide", close(got, uncond + s * (cond - uncond)), (
        "w taken for s: that is scale + 1" if close(got, cond + s * (cond - uncond)) else
        "the halves are exchanged: chunk gives them in the order of cat" if close(got, cond + s * (uncond - cond)) else
        "uncond + s (cond - uncond), with uncond asked at label null")
    for end, wanted, name in ((0.0, uncond, "null"), (1.0, cond, "the label")):
        yield f"scale {end:g} is what {name} gives", close(guided(lambda t: torch.full_like(t, end)), wanted), (
            "at s = 0 nothing of cond is left, at s = 1 nothing of uncond")
    line = lambda t: low + slope * t  # noqa: E731
    got, anyones = guided(line), [uncond + float(line(u)) * (cond - uncond) for u in (*t, t.mean())]
    yield "each sample has the scale of its own time", close(got, uncond + like_zt(line(t)) * (cond - uncond)), (
        "scale(t), of shape (B,), met the width of the latents: reshape it to (B, 1, 1, 1)"
        if close(got, uncond + line(t).to(zt) * (cond - uncond)) else
        "one scale for the whole batch: use all of scale(t)" if any(close(got, one) for one in anyones) else
        "the scale of sample i is scale(t)[i]")
    ends = lambda t: torch.where(t < 0.3, 0.0, torch.where(t < 0.7, 1.0, s))  # noqa: E731
    yield "0, 1 and more may stand in one batch", close(guided(ends), uncond + like_zt(ends(t)) * (cond - uncond)), (
        "a short cut for scale 0 or 1 may be taken only where all samples of the batch have it: .all(), not .any()")

    # 40 times, more of them at large t: their mean is far from that of all t in (0, 1)
    times, wanted = uniform(0.0, 1.0, 40, seed=7).double() ** 0.5, float(uniform(0.5, 1.5, seed=8))
    for name, shape in {"w like t": lambda t: t, "w like 1 - t": lambda t: 1 - t,
                        "w in an interval": lambda t: ((t >= 0.2) & (t <= 0.8)).to(t)}.items():
        w, each = of_mean(shape, times, wanted)(times) - 1, shape(times)
        yield f"{name}: it has the mean asked for", close(w.mean(), wanted), (
            "that is the mean of s = 1 + w" if close(w.mean() + 1, wanted) else
            "divide by the mean of the shape over the times given: they are not uniform")
        yield f"{name}: it is a multiple of the shape", close(w * each.mean(), wanted * each), (
            "s = 1 + c shape(t): where the shape is 0 there is no guidance, s = 1")
        w = of_mean(shape, times, wanted)(t) - 1
        yield f"{name}: it takes any times", close(w * each.mean(), wanted * shape(t)), (
            "c is found once, from the times given; then s(t) = 1 + c shape(t) for the t that comes")
