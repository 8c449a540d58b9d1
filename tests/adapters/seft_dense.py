"""SEFT written down densely in float64 with sets and sorted lists: what the adapter is compared with."""

import math

import torch


class DenseSEFT:
    """One weight: ``w0`` float64 [m, n] with its ``mask``, deltas by position, AdamW with an age a position."""

    def __init__(self, w0, mask, positions, mode, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0, group=None):
        self.w0, self.kept0 = w0.flatten().tolist(), set(mask.flatten().nonzero().flatten().tolist())
        self.shape, self.size = w0.shape, w0.numel()
        self.delta = dict.fromkeys(positions, 0.0)
        self.state = {p: [0.0, 0.0, 0] for p in positions}  # mean, square, age
        self.removed, self.grown = set(), set()
        self.mode, self.lr, self.betas, self.eps, self.decay, self.group = mode, lr, betas, eps, decay, group
        self.window = None

    @property
    def support(self):
        return (self.kept0 - self.removed) | self.grown

    def base(self, p):
        return self.w0[p] if p in self.kept0 and p not in self.removed and p not in self.grown else 0.0

    def theta(self, p):
        return self.base(p) + self.delta.get(p, 0.0)

    def weight(self):
        return torch.tensor([self.theta(p) for p in range(self.size)], dtype=torch.float64).view(self.shape)

    # A window of gradients, dense

    def open(self):
        self.window = {"total": torch.zeros(self.size).double(), "squares": torch.zeros(self.size).double(), "steps": 0}

    def first_batch(self, gradient):
        g, k, support = gradient.flatten().tolist(), len(self.delta), self.support
        allowed = range(self.size) if self.mode == "unstructured" else sorted(support)
        self.window["grow"] = set(sorted((p for p in allowed if g[p]), key=lambda p: (-abs(g[p]), p))[:k])
        self.window["prune"] = set(sorted(support, key=lambda p: (abs(self.theta(p) * g[p]), p))[:k])
        if self.mode == "nm_swap":
            pairs = []
            for start in range(0, self.size, self.group):
                inside = range(start, start + self.group)
                into = min((p for p in inside if p not in support), key=lambda p: (-abs(g[p]), p))
                out = min((p for p in inside if p in support), key=lambda p: (abs(self.theta(p) * g[p]), p))
                cost = abs(self.theta(out) * g[out])
                pairs.append((-(g[into] ** 2) / cost if cost else -math.inf, start, out, into))
            self.window["pairs"] = [(out, into) for _, _, out, into in sorted(pairs)[:k]]

    def close_step(self, gradient):
        g = gradient.flatten()
        self.window["total"] += g
        self.window["squares"] += g * g
        self.window["steps"] += 1

    def adam(self, gradient):
        g, (b1, b2) = gradient.flatten().tolist(), self.betas
        for p, state in self.state.items():
            state[0] = b1 * state[0] + (1 - b1) * g[p]
            state[1] = b2 * state[1] + (1 - b2) * g[p] ** 2
            state[2] += 1
            mean, square = state[0] / (1 - b1 ** state[2]), state[1] / (1 - b2 ** state[2])
            self.delta[p] *= 1 - self.lr * self.decay
            self.delta[p] -= self.lr * mean / (math.sqrt(square) + self.eps)

    # The rules

    def adapt(self):
        """Positions that are pruned back."""
        total = self.window["total"].tolist()
        excess = len(self.grown) - len(self.removed)
        by_sensitivity = sorted(self.window["prune"], key=lambda p: (abs(self.theta(p) * total[p]), p))
        out = set(by_sensitivity[:excess])
        self.removed |= out - self.grown
        self.grown -= out
        return out

    def evolve(self, count):
        total, slots = self.window["total"].tolist(), len(self.delta)
        out = self.adapt()
        alive = [p for p in self.delta if p not in out]
        dropped = self.smallest(alive, count)
        lost, stay = dropped & self.grown, set(alive) - dropped
        of_base = self.kept0 - self.removed
        order = sorted(
            (p for p in self.window["grow"] if p not in stay and total[p]), key=lambda p: (-abs(total[p]), p)
        )
        first = [p for p in order if p in self.grown or p not in of_base][: len(lost)]
        back = self.largest(lost - set(first), len(lost) - len(first))
        rest = [p for p in order if p not in first and p not in back]
        grow = set(first + rest[: slots - len(stay) - len(first) - len(back)])
        back |= self.largest(dropped - back - grow, slots - len(stay) - len(back) - len(grow))
        self.grown = {p for p in self.grown | (grow - of_base) if p in stay | back | grow}
        self.settle(stay | back | (dropped & grow), grow - dropped)

    def swap(self, count, swaps, step_size, fresh_age):
        total, slots, group = self.window["total"].tolist(), len(self.delta), self.group
        fresh = {p for p in self.grown if self.state[p][2] <= fresh_age}
        dropped = self.smallest([p for p in self.delta if p not in fresh], count)
        lost = dropped & self.grown
        self.grown -= lost
        for p in lost:
            inside = [q for q in self.removed - self.grown if q // group == p // group]
            self.removed.remove(min(inside, key=lambda q: (-abs(self.w0[q]), q)))
        good = []
        for out, into in self.window["pairs"]:
            gain, cost = step_size * total[into] ** 2, abs(self.weight_before[out] * total[out])
            if gain > cost and out not in fresh and all(out // group != p // group for p in lost):
                good.append((-gain / cost if cost else -math.inf, out // group, out, into))
        taken, outs, intos = 0, set(), set()
        for _, _, out, into in sorted(good)[:swaps]:
            taken += out not in self.delta or out in dropped
            if taken > len(dropped):
                break
            outs.add(out)
            intos.add(into)
        self.removed |= outs - self.grown
        self.grown = (self.grown - outs) | intos
        alive = set(self.delta) - outs - lost
        dropped &= alive
        stay = alive - dropped
        wanted = slots - len(stay) - len(intos)
        allowed = (p for p in self.window["grow"] if p not in stay | outs | lost and total[p])
        grow = set(sorted(allowed, key=lambda p: (-abs(total[p]), p))[:wanted])
        back = self.largest(dropped - grow, wanted - len(grow))
        self.settle(stay | back | (dropped & grow), (grow - dropped) | intos)

    def smallest(self, positions, count):
        return set(sorted(positions, key=lambda p: (abs(self.delta[p]), p))[:count])

    def largest(self, positions, count):
        return set(sorted(positions, key=lambda p: (-abs(self.delta[p]), p))[:count])

    def settle(self, stay, new):
        """Deltas at ``stay`` and ``new``; slots that nobody takes go to the first kept positions without one."""
        w, (b1, b2) = self.window, self.betas
        k, slots = w["steps"], len(self.delta)
        spare = (p for p in sorted(self.support) if p not in stay | new)
        fill = [next(spare) for _ in range(slots - len(stay) - len(new))]
        self.delta = {p: self.delta[p] for p in stay} | dict.fromkeys([*new, *fill], 0.0)
        seeds = {p: (w["total"][p].item() / k, w["squares"][p].item() / k) for p in new}
        grown = {p: [mean * (1 - b1**k), square * (1 - b2**k), k] for p, (mean, square) in seeds.items()}
        self.state = {p: self.state[p] for p in stay} | grown | {p: [0.0, 0.0, 0] for p in fill}
        self.window = None

    def finish(self):
        if len(self.grown) > len(self.removed):
            out = self.adapt()
            self.settle({p for p in self.delta if p not in out}, set())
