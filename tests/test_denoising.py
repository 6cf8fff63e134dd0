"Denoising queries: group sizes, noise ranges, targets, masks, empty images (acceptance 8 in part, 9, 10, 11)"

import pytest, torch
from torch import nn
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.detectors.denoising import (
    DenoisingConfig,
    ExtraQueries,
    combine_extras,
    denoising_queries,
    group_mask,
    group_sizes,
    noise_boxes,
    noise_labels,
)

C, D = 5, 8


def target(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(labels=torch.randint(C, (n,), generator=g), boxes=torch.rand(n, 4, generator=g) * 0.2 + 0.4)


def table(rows=C):
    return nn.Embedding(rows, D)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    'n,groups,slots', [(1, 100, 200), (3, 33, 198), (7, 14, 196), (50, 2, 200), (100, 1, 200), (101, 1, 202)]
)
def test_groups_and_pad(n, groups, slots):
    assert group_sizes(n) == (groups, slots)
    q = denoising_queries([target(n)], table(), C)
    assert q.content.shape == (1, slots, D) and q.boxes.shape == (1, slots, 4)
    assert q.mask.shape == (slots, slots)
    assert q.meta['groups'] == groups and q.meta['n_max'] == n and q.meta['target'].shape == (1, slots)


def test_box_noise_ranges():
    gt = torch.rand(2000, 4) * 0.2 + 0.3
    half = (gt[:, 2:] / 2).repeat(1, 2)
    for negative, lo, hi in ((False, 0.0, 0.4), (True, 0.4, 0.8)):
        moved = noise_boxes(gt, torch.full((2000,), negative), 0.4)
        step = (moved - cxcywh_to_xyxy(gt)) / half
        assert step.abs().max() < hi + 1e-5 and step.abs().min() >= lo - 1e-5
        assert step.abs().max() > hi - 0.01 and step.abs().min() < lo + 0.01  # the whole range is used
        assert ((step > 0).float().mean(0) - 0.5).abs().max() < 0.05  # every coordinate goes either way
        assert abs(step.abs().mean() - (lo + hi) / 2) < 0.01
    flips = (noise_boxes(gt, torch.zeros(2000, dtype=torch.bool)) - cxcywh_to_xyxy(gt) > 0).float()
    assert torch.corrcoef(flips.T).fill_diagonal_(0).abs().max() < 0.1  # coordinates are independent


def test_flat_box_moves_by_its_own_sides():
    flat = torch.tensor([[0.5, 0.5, 0.4, 0.1]]).expand(500, 4)
    step = (noise_boxes(flat, torch.ones(500, dtype=torch.bool)) - cxcywh_to_xyxy(flat)).abs()
    assert step[:, [0, 2]].min() >= 0.4 * 0.2 - 1e-6 and step[:, [1, 3]].max() < 0.8 * 0.05 + 1e-6


def test_label_noise_share():
    labels = torch.randint(C, (100_000,))
    changed = (noise_labels(labels, C, 0.5) != labels).float().mean().item()
    assert abs(changed - 0.25 * (1 - 1 / C)) < 0.005
    new = noise_labels(torch.zeros(100_000, dtype=torch.long), C, 0.5)
    counts = torch.bincount(new, minlength=C) / 100_000
    assert (counts[1:] - 0.05).abs().max() < 0.005  # uniform
    assert torch.equal(noise_labels(labels, C, 0.0), labels)


def test_slots_hold_what_meta_says():
    targets = [target(2, 1), target(3, 2)]
    emb = table()
    q = denoising_queries(targets, emb, C, DenoisingConfig(num=24, label_noise=0.0))
    assert q.name == 'denoising' and q.meta['groups'] == 4 and q.meta['target'].shape == (2, 24)
    for b, t in enumerate(targets):
        truth = cxcywh_to_xyxy(t['boxes'])
        for s in range(24):
            slot, gt = s % 6, q.meta['target'][b, s].item()
            i, far = slot % 3, slot >= 3
            if i >= len(t['labels']):
                assert gt == -2 and not q.content[b, s].any() and not q.boxes[b, s].any()
                continue
            assert gt == (-1 if far else i)
            assert torch.equal(q.content[b, s], emb.weight[t['labels'][i]])
            half = (t['boxes'][i, 2:] / 2).repeat(2)
            step = ((cxcywh_to_xyxy(q.boxes[b, s].sigmoid()) - truth[i]) / half).abs()
            low, high = (0.4, 0.8) if far else (0.0, 0.4)
            assert low - 1e-3 < step.min() and step.max() < high + 1e-3
    assert len({tuple(x.tolist()) for x in q.boxes[1, ::6]}) == 4  # noise differs from group to group


def test_boxes_are_clamped_to_the_image_and_finite():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.01, 0.01]])
    t = dict(labels=torch.zeros(2, dtype=torch.long), boxes=boxes)
    q = denoising_queries([t], table(), C)
    xyxy = cxcywh_to_xyxy(q.boxes.sigmoid())
    assert torch.isfinite(q.boxes).all() and xyxy.min() >= -1e-4 and xyxy.max() <= 1 + 1e-4


def test_image_without_boxes_gets_one_fake_box_of_no_weight():
    q = denoising_queries([target(0), target(2)], table(), C, DenoisingConfig(num=8))
    assert q.meta['target'][0].tolist() == [-3] * 8 and q.meta['target'][1].tolist() == [0, 1, -1, -1] * 2
    used = q.boxes[0].abs().amax(-1) > 0
    assert used.tolist() == [True, False] * 4 and torch.equal(q.content[0].abs().amax(-1) > 0, used)
    step = (cxcywh_to_xyxy(q.boxes[0, ::4].sigmoid()) - torch.tensor([0.25, 0.25, 0.75, 0.75])) / 0.25
    assert step.abs().max() < 0.4 + 1e-3


def test_nothing_to_denoise():
    assert denoising_queries([target(0), target(0)], table(), C) is None
    assert denoising_queries([target(3)], table(), C, DenoisingConfig(num=0)) is None


def test_group_mask_against_a_loop():
    m = group_mask(3, 4)
    assert all(m[i, j].item() == (i // 4 != j // 4) for i in range(12) for j in range(12))


def test_gradient_reaches_the_label_table_only():
    emb = table(9)
    q = denoising_queries([target(3)], emb, C)
    q.content.sum().backward()
    assert emb.weight.grad[:C].any() and not emb.weight.grad[C:].any() and not q.boxes.requires_grad


def test_randomness_comes_from_the_generator_or_the_global_one():
    emb = table()

    def draw(g=None):
        return denoising_queries([target(3), target(0)], emb, C, generator=g)

    a, b = draw(torch.Generator().manual_seed(3)), draw(torch.Generator().manual_seed(3))
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.content, b.content)
    state = torch.get_rng_state()
    draw(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is drawn
    c = draw()
    torch.set_rng_state(state)
    assert torch.equal(draw().boxes, c.boxes) and not torch.equal(c.boxes, a.boxes)


def test_targets_are_not_changed():
    t = target(3)
    before = {k: v.clone() for k, v in t.items()}
    denoising_queries([t], table(), C)
    assert all(torch.equal(t[k], before[k]) for k in t)


# --- several sets of extra queries (spec 3.2) ------------------------------------------


def extra(P, name, groups=1):
    return ExtraQueries(torch.randn(2, P, D), torch.randn(2, P, 4), group_mask(groups, P // groups), name)


def test_combined_mask_against_the_rules():
    first, second, Q = extra(6, 'consistency', 3), extra(4, 'denoising', 2), 5
    content, boxes, blocked, slices = combine_extras([first, second], Q)
    assert slices == dict(consistency=slice(0, 6), denoising=slice(6, 10)) and blocked.shape == (15, 15)
    assert torch.equal(content[:, :6], first.content) and torch.equal(boxes[:, 6:], second.boxes)

    def group(i):
        if i < 6:
            return 'consistency', i // 2
        return ('denoising', (i - 6) // 2) if i < 10 else 'match'

    for i in range(15):
        for j in range(15):
            assert blocked[i, j].item() == (group(j) != 'match' and group(i) != group(j)), (i, j)
    assert not blocked.all(1).any()  # every query attends to something


def test_no_extras():
    assert combine_extras([], 5) == (None, None, None, {}) and combine_extras((), 5)[3] == {}


def test_names_must_differ():
    with pytest.raises(ConfigError, match='share a name'):
        combine_extras([extra(2, 'a'), extra(2, 'a')], 3)


def test_empty_extra_set():
    none = ExtraQueries(
        torch.zeros(2, 0, D), torch.zeros(2, 0, 4), torch.zeros(0, 0, dtype=torch.bool), 'none'
    )
    content, _, blocked, slices = combine_extras([none], 3)
    assert slices['none'] == slice(0, 0) and blocked.shape == (3, 3) and not blocked.any()
