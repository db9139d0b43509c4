"""Scoring by a model that learns, written again from the definitions: float64, one row after the other, every formula
by hand. Of train_gpt.py it uses the settings and the forward pass of the model (tests/help/reference.py has that one again);
what reads the text, trains, keeps keys or holds adapters is written anew.

    nats = score_first(s, seed, stream)            of every target, by TTT=off, full or lora
    nats = adapted_documents(s, seed, stream)      by TTT=lora_docs
"""

import math
import re
from functools import partial

import numpy as np
import reference as ref
import torch
from parameters import role_of

import train_gpt as tg

# --- the model, with adapters and with keys that are kept ------------------------------------------------------------


class Attention:
    """Causal attention in which a token sees the `width` up to itself. The keys and values of the first tokens of the
    row may be given: those that they had before the weights changed. What they are now is left in `made`, by visit.
    """

    def __init__(self, width):
        self.width, self.given, self.made = width, [], []

    def __call__(self, q, k, v, docs):
        if self.given:
            old_k, old_v = self.given[len(self.made)]
            k, v = torch.cat((old_k, k[:, old_k.size(1) :]), 1), torch.cat((old_v, v[:, old_v.size(1) :]), 1)
        self.made.append((k.detach(), v.detach()))
        at = torch.arange(q.size(1))
        seen = (at[:, None] >= at) & (at[:, None] - at < self.width)
        if docs is not None and docs.mask is not None:
            seen = seen & docs.mask[0, 0]
        k, v = (z.repeat_interleave(q.size(2) // z.size(2), 2) for z in (k, v))
        weight = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.size(-1))
        return torch.einsum("bhts,bshc->bthc", weight.masked_fill(~seen, -math.inf).softmax(-1), v)


class Net:
    """A model of random weights and, if wanted, adapters {(visit, "q"): (A, B)}; visit None is the head."""

    def __init__(self, s, seed, longest):
        long = tg.replace(s, eval_seq_len=max(longest, s.eval_seq_len))  # for tables of so many positions
        self.s, self.attention, self.adapters, self.visit = s, Attention(s.eval_seq_len), {}, 0
        self.model = ref.double(long, seed)
        self.scale = (s.ttt_lora_alpha or s.ttt_lora_rank) / s.ttt_lora_rank
        for block in self.model.blocks:
            block.register_forward_pre_hook(self._next_visit)
            block.attn.attend = self.attention
            for what in "qkvo":
                getattr(block.attn, what).register_forward_hook(partial(self._add, what))
            block.attn.register_forward_hook(partial(self._add, "attn"))
            block.mlp.register_forward_hook(partial(self._add, "mlp"))

    def _next_visit(self, *_):
        self.visit += 1

    def _add(self, what, module, inputs, output):
        """Of o, the attention and the MLP the second input is what scales their channels."""
        pair = self.adapters.get((self.visit, what))
        if pair is None:
            return output
        more = self.scale * inputs[0] @ pair[0].T @ pair[1].T
        return output + (inputs[1] * more if self.s.ttt_lora_scaled and what in ("o", "attn", "mlp") else more)

    def nats(self, ids, targets, adapters=None, given=(), temperature=1.0):
        """Of targets (T,) behind the tokens ids (T,)."""
        self.attention.given, self.attention.made, self.adapters, self.visit = given, [], adapters or {}, -1
        model, cap = self.model, self.s.logit_softcap
        hidden = model.hidden(ids[None])[0]
        narrow = hidden if model.head_proj is None else hidden @ model.head_proj.weight.T
        logits = narrow @ (model.embed if model.head is None else model.head).weight.T
        if pair := self.adapters.get((None, "head")):
            logits = logits + self.scale * hidden @ pair[0].T @ pair[1].T
        if model.caps is not None:
            cap = torch.where(logits > 0, *model.caps.caps)
        logits = (cap * torch.tanh(logits / cap) if self.s.logit_softcap else logits) / temperature
        return -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


# --- steps -----------------------------------------------------------------------------------------------------------


class SGD:
    def __init__(self, momentum):
        self.momentum, self.buffers = momentum, {}

    def step(self, key, weight, grad, lr):
        self.buffers[key] = self.momentum * self.buffers.get(key, 0) + grad
        return weight - lr * self.buffers[key]


class AdamW:
    def __init__(self, beta1, beta2, eps, decay):
        self.betas, self.eps, self.decay, self.state = (beta1, beta2), eps, decay, {}

    def step(self, key, weight, grad, lr):
        t, mean, square = self.state.get(key, (0, 0, 0))
        t, mean, square = t + 1, self.betas[0] * mean + (1 - self.betas[0]) * grad, (
            self.betas[1] * square + (1 - self.betas[1]) * grad**2)
        self.state[key] = t, mean, square
        away = mean / (1 - self.betas[0] ** t) / ((square / (1 - self.betas[1] ** t)).sqrt() + self.eps)
        return weight - lr * self.decay * weight - lr * away


def rates(s, model):
    """{name of a weight that learns: its learning rate}."""
    found = {}
    for name, _ in model.named_parameters():
        layer = re.match(r"blocks\.(\d+)\.", name)
        scalar = not name.endswith(".weight")
        frozen = layer and int(layer[1]) < s.ttt_freeze_blocks and not (s.ttt_train_scales and scalar)
        if frozen or s.ttt_freeze_embed and role_of(name) in ("embed", "head"):
            continue
        found[name] = s.ttt_lr * (s.ttt_lr_mult_proj if name.endswith((".attn.o.weight", ".mlp.down.weight")) else
                                  s.ttt_lr_mult_fc if name.endswith(".mlp.up.weight") else 1)
    return found


def cosine(s, progress):
    return s.ttt_min_lr + (1 - s.ttt_min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Weights:
    """What learns, {name: tensor}, and how: fit() makes the steps of TTT_EPOCHS passes over some targets."""

    def __init__(self, s, net, stream):
        self.s, self.net, self.stream = s, net, stream
        named = dict(net.model.named_parameters())
        self.rates = rates(s, net.model)
        self.named = {name: named[name].requires_grad_() for name in self.rates}
        self.mean = {name: weight.detach().clone() for name, weight in self.named.items()}
        self.renew()

    def renew(self):
        s = self.s
        self.optimizer = SGD(s.ttt_momentum) if s.ttt_optimizer == "sgd" else AdamW(0.9, 0.999, 1e-8, 0)

    def adapters(self):
        return None

    def fit(self, targets, epochs, scale):
        s, ids = self.s, self.stream.tokens.long()
        rows = [targets[i : i + s.eval_seq_len] for i in range(0, len(targets), s.eval_seq_len)]
        batches = [rows[i : i + s.ttt_batch_seqs] for i in range(0, len(rows), s.ttt_batch_seqs)]
        steps = [batch for _ in range(epochs) for batch in batches]
        for number, batch in enumerate(steps):
            sizes = self.stream.bytes if s.byte_weighted_ttt else torch.ones_like(self.stream.bytes)
            weights = [sizes[row].double() for row in batch]
            total = sum(weight.sum() for weight in weights)
            loss = sum((weight * self.net.nats(ids[row], ids[row + 1], self.adapters())).sum()
                       for weight, row in zip(weights, batch)) / max(total, 1)
            grads = torch.autograd.grad(loss, list(self.named.values()))
            norm = math.sqrt(sum((grad**2).sum() for grad in grads))
            clip = min(1, s.ttt_grad_clip / norm) if s.ttt_grad_clip and norm else 1
            with torch.no_grad():
                for (name, weight), grad in zip(self.named.items(), grads):
                    lr = self.rates[name] * scale(number / len(steps))
                    weight.copy_(self.optimizer.step(name, weight, clip * grad, lr))
                    self.mean[name] = s.polyak_decay * self.mean[name] + (1 - s.polyak_decay) * weight


class Adapters(Weights):
    """The same of one set of adapters."""

    def __init__(self, s, net, stream, start):
        self.s, self.net, self.stream = s, net, stream
        self.pairs = fresh(start)
        self.named = {(place, i): pair[i] for place, pair in self.pairs.items() for i in (0, 1)}
        self.rates = dict.fromkeys(self.named, s.ttt_lora_lr)
        self.mean = {name: weight.detach().clone() for name, weight in self.named.items()}
        self.renew()

    def renew(self):
        self.optimizer = adamw(self.s)

    def adapters(self):
        return self.pairs


def adamw(s):
    return AdamW(s.ttt_beta1, s.ttt_beta2, 1e-10, s.ttt_wd)


def fresh(start):
    return {place: tuple(z.detach().clone().double().requires_grad_() for z in pair) for place, pair in start.items()}


# --- what is read ----------------------------------------------------------------------------------------------------


def documents(stream):
    """[(first target, end)]: a document begins at every BOS; the BOS of the next one is its last target."""
    ids, n = stream.tokens.tolist(), len(stream.bytes)
    starts = [0] + [i for i in range(1, n) if ids[i] == ref.BOS]
    return list(zip(starts, [*starts[1:], n]))


def sliding(a, b, length, stride):
    """[(begin, first target, end)] of the windows over the targets a..b: each begins `stride` behind the one before."""
    rows, stride = [(a, a, min(a + length, b))], stride or length
    while rows[-1][2] < b:
        begin, _, end = rows[-1]
        rows.append((begin + stride, end, min(begin + stride + length, b)))
    return rows


def parts(s, stream, learns):
    """[rows of each part]: (begin, first target, end), of which the tokens from `begin` on are read."""
    n, length = len(stream.bytes), s.eval_seq_len
    unit = s.ttt_chunk_tokens if learns else n
    pieces = documents(stream) if s.eval_docs else [(0, n)]
    if s.eval_context == "window":
        found = {}
        for a, b in pieces:
            for row in sliding(a, b, length, s.eval_stride):
                found.setdefault(row[1] // unit, []).append(row)
        return list(found.values())
    if s.eval_docs:
        found = {}
        for a, b in pieces:
            found.setdefault((b - 1) // unit, []).append((a, a, b))
        return list(found.values())
    found, segment = [], min(32 * length, max(unit // 16, length))
    for a in range(0, n, unit):
        b = min(a + unit, n)
        found.append([(max(first - length, 0), first, min(first + segment, b)) for first in range(a, b, segment)])
    return found


# --- predictors ------------------------------------------------------------------------------------------------------


def score_first(s, seed, stream, start=None):
    """(nats of every target, {name: weight} at the end) of TTT=off, full or lora."""
    ids, found, net = stream.tokens.long(), torch.zeros(len(stream.bytes)).double(), Net(s, seed, len(stream.tokens))
    plan = parts(s, stream, s.ttt != "off")
    learner = {"full": lambda: Weights(s, net, stream), "lora": lambda: Adapters(s, net, stream, start),
               "off": lambda: None}[s.ttt]()
    for number, rows in enumerate(plan):
        raw = {}
        if s.polyak_decay and learner:
            raw = {name: weight.detach().clone() for name, weight in learner.named.items()}
            put(learner.named, learner.mean)
        for begin, first, end in rows:
            adapters = learner.adapters() if learner else None
            with torch.no_grad():
                costs = net.nats(ids[begin:end], ids[begin + 1 : end + 1], adapters, temperature=s.eval_temperature)
            found[first:end] = costs[first - begin :]
        put(learner.named if learner else {}, raw)
        if learner and number + 1 < len(plan):
            progress = number / (len(plan) - 1)
            scale = cosine(s, progress) * (1 + (s.adaptive_lr_max - 1) * min(progress / 0.3, 1))
            learner.fit(np.arange(rows[0][1], rows[-1][2]), s.ttt_epochs, lambda _: scale)
    return found, {name: weight.detach() for name, weight in net.model.named_parameters()}


@torch.no_grad()
def put(named, values):
    for name, value in values.items():
        named[name].copy_(value)


def adapted_documents(s, seed, stream, start, draw=None):
    """Nats of every target of TTT=lora_docs. Adapters begin at `start`, or with TTT_LORA_A=own at draw(time, place), for a
    place the first time after each phase - without a warm start, in each group - and then where the one there ended.
    """
    ids, found, net = stream.tokens.long(), torch.zeros(len(stream.bytes)).double(), Net(s, seed, len(stream.tokens))
    order = sorted(documents(stream), key=lambda row: row[0] - row[1])  # longest first
    phases = s.phased_ttt_num_phases
    ends = {round(s.phased_ttt_prefix_docs * i / phases) for i in range(1, phases + 1)}
    learner = Weights(s, net, stream) if s.phased_ttt_prefix_docs else None
    groups = {0, *ends, *(range(0, len(order), s.ttt_group_docs) if learner or s.ttt_warm_start_a else ())}
    ended, own, time, place = [], {}, 0, -1
    for number, (a, b) in enumerate(order):
        place = 0 if number in groups else place + 1
        if number and number in ends or number and place == 0 and not s.ttt_warm_start_a:
            own, time = {}, time + (number in ends and s.phased_ttt_prefix_docs > 0) + (not s.ttt_warm_start_a)
        if draw:
            start = own.get(place) or draw(time, place)
        elif number in groups and ended and s.ttt_warm_start_a:
            start = {place: (sum(last[place][0] for last in ended) / len(ended), b) for place, (_, b) in start.items()}
        ended = [] if number in groups else ended
        if number in ends and number:
            learner.renew()
            read = np.concatenate([np.arange(*row) for row in order[:number]])
            learner.fit(read, s.ttt_epochs, lambda progress: cosine(s, progress))
        pairs, optimizer, at, given = fresh(start), adamw(s), a, ()
        while at < b:
            size = next((size for size, until in sorted(s.ttt_short_chunks, key=lambda one: one[1]) if at - a < until),
                        s.ttt_chunk_size)
            end = min(at + size, b)
            begin = a if s.eval_context == "cache" else max(a, at + size - s.eval_seq_len)
            nats = net.nats(ids[begin:end], ids[begin + 1 : end + 1], pairs, given, s.eval_temperature)[at - begin :]
            found[at:end] = nats.detach()
            if s.eval_context == "cache":
                given = net.attention.made
            if end < b:
                named = {(place, i): pair[i] for place, pair in pairs.items() for i in (0, 1)}
                grads = torch.autograd.grad(nats.mean(), list(named.values()))
                with torch.no_grad():
                    for (name, weight), grad in zip(named.items(), grads):
                        weight.copy_(optimizer.step(name, weight, grad, s.ttt_lora_lr))
            at = end
        ended.append({where: tuple(z.detach() for z in pair) for where, pair in pairs.items()})
        own[place] = {where: (pair[0], torch.zeros_like(pair[1])) for where, pair in ended[-1].items()}
    return found
