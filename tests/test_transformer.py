"Encoder, query selection, decoder: oracles, gradient patterns, padding, empty and invalid input"

import copy, math
import pytest, torch
from torch import nn
from semidetr.core import ConfigError
from semidetr.boxes import inverse_sigmoid
from semidetr.detectors.transformer import (
    MLP,
    Decoder,
    DecoderLayer,
    EncoderLayer,
    SelfAttention,
    Transformer,
    TransformerConfig,
    _kept_geometry,
    anchor_logits,
    predict_boxes,
    refine,
    select_queries,
    sine_embed_boxes,
    token_geometry,
)

TINY = dict(d_model=32, n_heads=4, n_levels=2, n_points=2, enc_layers=2, dec_layers=3, ffn=48, num_queries=12)


def tiny(**kw):
    return TransformerConfig(**{**TINY, **kw})


def heads(d=32, C=3):
    return nn.Linear(d, C), MLP(d, d, 4, 3)


def randomised(module, std=0.3):
    "Give every parameter a value that matters: fresh ones hide mistakes behind zeros"
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def maps(sizes=((8, 8), (4, 4)), B=2, d=32):
    return [torch.randn(B, d, h, w) for h, w in sizes]


def run(model, cls, box, features, masks=None):
    enc = model.encode(features, masks, cls, box)
    start = enc.reference_logits.sigmoid()
    hs, references, _ = model.decoder(
        enc.content, start, enc.memory, enc.shapes, box, enc.padding_mask, enc.valid_ratios
    )
    return enc, hs, references


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- configuration ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'field,value,known',
    [
        ('activation', 'relo', "'relu'"),
        ('query_content', 'learnt', 'learned'),
        ('select_score', 'mean', 'max'),
    ],
)
def test_unknown_literal_is_named(field, value, known):
    with pytest.raises(ConfigError, match=value) as e:
        TransformerConfig(**{field: value})
    assert known in str(e.value)


def test_width_must_fit_the_heads():
    with pytest.raises(ConfigError, match='d_model=30'):
        TransformerConfig(d_model=30)
    with pytest.raises(ConfigError, match='num_queries'):
        TransformerConfig(num_queries=0)


# --- anchors (acceptance 6) and selection ----------------------------------------------


def test_anchor_of_first_cells():
    logits, valid = anchor_logits([(4, 4), (2, 2)])
    a = logits.sigmoid()[0]
    assert torch.allclose(a[0], torch.tensor([0.125, 0.125, 0.05, 0.05]), atol=1e-6)
    assert torch.allclose(a[16], torch.tensor([0.25, 0.25, 0.1, 0.1]), atol=1e-6)
    assert torch.allclose(a[1, :2], torch.tensor([0.375, 0.125]), atol=1e-6)  # x runs first
    assert valid.all() and len(a) == 20


def test_anchor_near_the_border_is_invalid():
    logits, valid = anchor_logits([(1, 50)])  # first centre at exactly .01, last at .99
    assert valid[0].tolist() == [False] + [True] * 48 + [False]
    assert (logits[0, 0] == math.inf).all() and (logits[0, 0].sigmoid() == 1).all()


def test_anchor_of_a_coarse_level_has_no_side_above_99_percent():
    _, valid = anchor_logits([(2, 2)] * 6)
    assert valid.view(6, 4).all(1).tolist() == [True] * 5 + [False]  # .05*2^5 = 1.6


def test_anchors_count_valid_cells_only():
    wh = torch.tensor([[[2.0, 4.0], [1.0, 2.0]], [[4.0, 4.0], [2.0, 2.0]]])
    logits, valid = anchor_logits([(4, 4), (2, 2)], wh)
    assert torch.allclose(logits[0, 0].sigmoid(), torch.tensor([0.25, 0.125, 0.05, 0.05]), atol=1e-6)
    assert valid[0, :16].view(4, 4).tolist() == [[True, True, False, False]] * 4 and valid[1].all()


def test_selection_against_a_loop():
    logits, valid = torch.randn(3, 20, 4), torch.rand(3, 20) > 0.4
    got = select_queries(logits, 6, valid)
    for b in range(3):
        order = sorted((i for i in range(20) if valid[b, i]), key=lambda i: -logits[b, i].max().item())
        assert got[b].tolist() == order[:6]
    by_class0 = logits[0, :, 0].argsort(descending=True)[:6]
    assert torch.equal(select_queries(logits, 6, None, 'class0')[0], by_class0)


def test_selection_puts_invalid_tokens_last_and_caps_the_count():
    logits, valid = torch.randn(1, 8, 2), torch.tensor([[True] * 3 + [False] * 5])
    got = select_queries(logits + 100 * ~valid[..., None], 50, valid)[0].tolist()
    assert len(got) == 8 and set(got[:3]) == {0, 1, 2}


# --- codes -----------------------------------------------------------------------------


def test_box_code_against_a_loop():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    want = []
    for v in (0.2, 0.1, 0.3, 0.4):  # y, x, w, h
        for i in range(128):
            angle = 2 * math.pi * v / 10000 ** (2 * (i // 2) / 128)
            want.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    assert torch.allclose(sine_embed_boxes(box), torch.tensor(want, dtype=torch.float64), atol=1e-12)
    for n in (5, 0):
        assert sine_embed_boxes(torch.rand(2, n, 4), 16).shape == (2, n, 64)


def test_self_attention_is_that_of_torch():
    attention, reference = randomised(SelfAttention(32, 4)), nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(attention.state_dict())
    x, pos = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    blocked = (torch.rand(7, 7) > 0.5).fill_diagonal_(False)
    for mask in (None, blocked):
        want = reference(x + pos, x + pos, x, attn_mask=mask, need_weights=False)[0]
        assert torch.allclose(attention(x, pos, mask), want, atol=1e-5)


# --- layers ----------------------------------------------------------------------------


def test_layer_order_and_names_of_norms():
    layer = randomised(DecoderLayer(tiny()))
    x, pos, mem = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 20, 32)
    ref, shapes = torch.rand(2, 5, 2, 4), [(4, 4), (2, 2)]
    y = layer.norm2(x + layer.self_attn(x, pos))
    y = layer.norm1(y + layer.cross_attn(y + pos, ref, mem, shapes, None))
    y = layer.norm3(y + layer.linear2(torch.relu(layer.linear1(y))))
    assert torch.allclose(layer(x, pos, ref, mem, shapes), y, atol=1e-5)
    enc, pts = randomised(EncoderLayer(tiny())), torch.rand(2, 20, 2, 2)
    p = torch.randn(1, 20, 32)
    z = enc.norm1(mem + enc.self_attn(mem + p, pts, mem, shapes, None))
    z = enc.norm2(z + enc.linear2(torch.relu(enc.linear1(z))))
    assert torch.allclose(enc(mem, p, pts, shapes), z, atol=1e-5)


def test_dropout_acts_in_training_only():
    layer = randomised(EncoderLayer(tiny(dropout=0.5)), 0.2)
    a = (torch.randn(1, 20, 32), torch.randn(1, 20, 32), torch.rand(1, 20, 2, 2), [(4, 4), (2, 2)])
    assert not torch.equal(layer(*a), layer(*a))
    layer.eval()
    assert torch.equal(layer(*a), layer(*a))


def test_initialisation():
    m = Transformer(tiny(d_model=64, num_queries=100))
    bound = math.sqrt(6 / (100 + 64))
    assert m.query_content.weight.abs().max() <= bound and m.query_content.weight.std() > bound / 3
    w = m.decoder.layers[0].self_attn.in_proj_weight
    assert w.abs().max() <= math.sqrt(6 / (3 * 64 + 64))  # one Xavier over the stacked matrix
    attn = m.encoder.layers[1].self_attn
    assert not attn.sampling_offsets.weight.any() and not attn.attention_weights.weight.any()
    assert attn.sampling_offsets.bias.any()
    assert m.level_embed.abs().max() > bound and abs(m.level_embed.std() - 1) < 0.4  # normal, not Xavier


# --- refinement (acceptance 7) ---------------------------------------------------------


def chain(n_layers, twice):
    "The real decoder, its box head replaced by leaf corrections, one for each layer"
    cfg = tiny(dec_layers=n_layers)
    dec = Decoder(cfg)
    leaves = [torch.full((1, 4, 4), 0.1 * (d + 1), requires_grad=True) for d in range(n_layers)]
    calls = iter(leaves)
    reference = (torch.rand(1, 4, 4) * 0.5 + 0.2).requires_grad_()
    hs, refs, _ = dec(
        torch.randn(1, 4, 32), reference, torch.randn(1, 20, 32), [(4, 4), (2, 2)], lambda o: next(calls)
    )
    return leaves, reference, refs, predict_boxes(refs, torch.stack(leaves), twice)


@pytest.mark.parametrize('twice', [True, False])
def test_look_forward_twice_reaches_exactly_one_layer_back(twice):
    leaves, reference, refs, boxes = chain(5, twice)
    for d in range(5):
        wrt = [*leaves, reference]
        grads = torch.autograd.grad(boxes[d].sum(), wrt, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.abs().sum() > 0) for g in grads]
        want = [i == d or (twice and i == d - 1) for i in range(5)] + [False]
        assert reached == want, (d, reached)


def test_refinement_formula():
    leaves, reference, refs, boxes = chain(4, True)
    b = reference.detach()
    for d in range(4):
        assert torch.allclose(refs[d], b, atol=1e-6)
        b = torch.sigmoid(leaves[d].detach() + inverse_sigmoid(b))
        assert torch.allclose(boxes[d], b, atol=1e-6)


def test_refine_is_finite_at_the_ends():
    d = torch.zeros(4, requires_grad=True)
    out = refine(torch.tensor([0.0, 1.0, 0.5, 1e-9]), d)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(d.grad).all() and out[2] == 0.5
    assert refine(torch.tensor([0.5]), torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_box_head_gets_raw_output_and_loss_head_the_normalised_one():
    dec, inputs = Decoder(tiny(dec_layers=2)), []
    nn.init.constant_(dec.norm.weight, 3.0)

    def head(o):
        inputs.append(o)
        return torch.zeros(*o.shape[:-1], 4)

    hs, _, _ = dec(torch.randn(1, 4, 32), torch.rand(1, 4, 4), torch.randn(1, 20, 32), [(4, 4), (2, 2)], head)
    (raw,) = inputs
    assert torch.allclose(dec.norm(raw), hs[0]) and not torch.allclose(raw, hs[0])


# --- whole transformer -----------------------------------------------------------------


def padded(features, masks, extra):
    "The same maps with `extra` rows and columns of random numbers"
    out, m2 = [], []
    for l, f in enumerate(features):
        e = extra // 2**l
        g = torch.randn(*f.shape[:2], f.shape[2] + e, f.shape[3] + e)
        g[:, :, : f.shape[2], : f.shape[3]] = f
        m = torch.ones(g.shape[0], *g.shape[-2:], dtype=torch.bool)
        m[:, : f.shape[2], : f.shape[3]] = False if masks is None else masks[l]
        out.append(g)
        m2.append(m)
    return out, m2


@pytest.mark.parametrize('content', ['learned', 'memory'])
@pytest.mark.parametrize('masked', [False, True])
def test_padding_changes_nothing(content, masked):
    model = randomised(Transformer(tiny(query_content=content, position_unit='image')), 0.2).eval()
    cls, box = map(randomised, heads())
    f = maps()
    masks = None
    if masked:  # the second image is smaller than the first
        masks = [torch.zeros(2, *x.shape[-2:], dtype=torch.bool) for x in f]
        masks[0][1, :, 6:] = True
        masks[1][1, :, 3:] = True
    enc0, hs0, _ = run(model, cls, box, f, masks)
    for extra in (2, 8):
        enc, hs, _ = run(model, cls, box, *padded(f, masks, extra))
        assert torch.allclose(enc.enc_boxes, enc0.enc_boxes, atol=1e-4)
        assert torch.allclose(enc.enc_logits, enc0.enc_logits, atol=1e-4)
        assert torch.allclose(hs, hs0, atol=1e-4)


def test_official_position_unit_depends_on_padding_in_the_decoder_only():
    model = randomised(Transformer(tiny()), 0.2)
    cls, box = map(randomised, heads())
    f = maps()
    (enc0, hs0, _), (enc, hs, _) = run(model, cls, box, f), run(model, cls, box, *padded(f, None, 8))
    assert torch.allclose(enc.enc_logits, enc0.enc_logits, atol=1e-4)
    assert not torch.allclose(hs, hs0, atol=1e-4)


def test_unpadded_mask_equals_no_mask():
    model, (cls, box) = randomised(Transformer(tiny()), 0.2), heads()
    f = maps()
    zero = [torch.zeros(2, *x.shape[-2:], dtype=torch.bool) for x in f]
    assert torch.allclose(run(model, cls, box, f)[1], run(model, cls, box, f, zero)[1], atol=1e-5)


def test_images_of_a_batch_are_independent():
    model, (cls, box) = randomised(Transformer(tiny()), 0.2), heads()
    f = maps()
    both, one = run(model, cls, box, f)[1], run(model, cls, box, [x[:1] for x in f])[1]
    assert torch.allclose(both[:, :1], one, atol=1e-5)


def test_cache_is_filled_once_and_survives_inference_mode():
    model, (cls, box) = Transformer(tiny()), heads()
    f = maps()
    with torch.inference_mode():
        run(model, cls, box, f)
    assert len(model._cache) == 1
    (kept,) = model._cache.values()
    assert not any(t.is_inference() for t in (kept.position, kept.reference_points, kept.anchors))
    enc, hs, refs = run(model, cls, box, f)
    (hs.sum() + enc.enc_boxes.sum()).backward()  # an inference tensor in the graph would raise
    assert len(model._cache) == 1
    for n in range(40):
        _kept_geometry(model._cache, [torch.empty(1, 32, n + 1, 3)], None)
    assert len(model._cache) <= 32
    assert not any('cache' in k for k in model.state_dict())
    copy.deepcopy(model)


def test_fewer_tokens_than_queries():
    model, (cls, box) = randomised(Transformer(tiny(num_queries=500)), 0.2), [randomised(h) for h in heads()]
    f, masks = padded(maps(((4, 4), (2, 2))), None, 2)
    enc, hs, refs = run(model, cls, box, f, masks)
    S = 36 + 9
    assert hs.shape[2] == S and sorted(enc.selected[0].tolist()) == list(range(S))
    n = int((~enc.padding_mask[0]).sum())
    assert not enc.padding_mask[0, enc.selected[0, :n]].any()  # valid tokens first
    blank = cls(model.embed_token(torch.zeros(1, 32)))  # of padding the heads get zeros
    assert torch.allclose(enc.enc_logits[0, n:], blank.expand(S - n, -1), atol=1e-5)
    boxes = predict_boxes(refs, box(hs))
    for t in (hs, refs, boxes, enc.enc_boxes, enc.reference_logits):
        assert torch.isfinite(t).all()
    (hs.sum() + boxes.sum() + enc.enc_boxes.sum() + enc.enc_logits.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_valid_anchor_at_all():
    "One cell on each level: centre .5, but a side above .99 from level 5 on"
    model, (cls, box) = Transformer(tiny(n_levels=6)), heads()
    enc, hs, _ = run(model, cls, box, maps(((1, 1),) * 6))
    assert torch.isfinite(hs).all() and torch.isfinite(enc.reference_logits).all()
    assert enc.enc_boxes.min() >= 0


def test_proposals_equal_selection_with_gradient():
    "All rows with gradient, then gather: same values, same gradients as ranking without gradient"
    model, (cls, box) = randomised(Transformer(tiny()), 0.2), map(randomised, heads())
    enc = model.encode(maps(), None, cls, box)
    wrt = [model.enc_output.weight, cls.weight, enc.memory]
    loss = enc.enc_logits.square().sum() + enc.enc_boxes.sum()
    grads = torch.autograd.grad(loss, wrt, retain_graph=True)
    geo = token_geometry(enc.shapes, 32)
    h = model.enc_output_norm(model.enc_output(enc.memory * geo.valid[..., None]))
    logits, boxes = cls(h), (box(h) + geo.anchors).sigmoid()
    idx = logits.max(-1).values.topk(12, 1).indices
    assert torch.equal(idx, enc.selected)
    logits, boxes = (torch.stack([x[b, idx[b]] for b in range(2)]) for x in (logits, boxes))
    assert torch.allclose(logits, enc.enc_logits, atol=1e-5)
    assert torch.allclose(boxes, enc.enc_boxes, atol=1e-6)
    for a, b in zip(grads, torch.autograd.grad(logits.square().sum() + boxes.sum(), wrt)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_learned_content_is_the_same_for_every_image_and_memory_content_is_not():
    f, (cls, box) = maps(), heads()
    learned = Transformer(tiny()).encode(f, None, cls, box)
    assert torch.equal(learned.content[0], learned.content[1]) and learned.content.requires_grad
    model = Transformer(tiny(query_content='memory'))
    enc = model.encode(f, None, cls, box)
    assert not torch.allclose(enc.content[0], enc.content[1]) and not enc.content.requires_grad
    assert torch.allclose(cls(enc.content), enc.enc_logits, atol=1e-6) and not hasattr(model, 'query_content')


def test_references_are_detached_from_the_encoder():
    enc = Transformer(tiny()).encode(maps(), None, *heads())
    assert not enc.reference_logits.requires_grad and enc.enc_boxes.requires_grad


def test_select_invalid_is_the_official_ranking():
    model, (cls, box) = randomised(Transformer(tiny(select_invalid=True, num_queries=64)), 0.2), heads()
    nn.init.constant_(cls.weight, 0.0)
    nn.init.constant_(cls.bias, 0.0)
    f, masks = padded(maps(((4, 4), (2, 2))), None, 6)  # 25 of 125 tokens are valid, all scores equal
    enc = model.encode(f, masks, cls, box)
    is_padding = enc.padding_mask.gather(1, enc.selected)
    assert is_padding.any() and (enc.enc_boxes[is_padding] == 1).all()
    assert torch.isfinite(enc.reference_logits).all()


def test_double_precision_stays_double():
    model, (cls, box) = Transformer(tiny()).double(), [h.double() for h in heads()]
    enc, hs, refs = run(model, cls, box, [x.double() for x in maps()])
    assert {t.dtype for t in (hs, refs, enc.enc_boxes, enc.memory)} == {torch.float64}


@pytest.mark.parametrize('more', [0, 5])
def test_attention_in_bfloat16_is_written_out_and_agrees(monkeypatch, more):
    """Output and gradients of the written-out form are those of float32, up to 8 bits

    Blocked pairs stay blocked; without gradients torch's own form runs."""
    torch.manual_seed(0)
    attn, n = SelfAttention(32, 4), 12
    x, pos = torch.randn(2, n, 32, requires_grad=True), torch.randn(2, n, 32)
    others = [(torch.randn(2, more, 32), torch.randn(2, more, 32))] if more else []
    blocked = torch.zeros(n, n + more, dtype=torch.bool)
    blocked[4:, :4] = True
    calls, fused = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kw):
        calls.append(1)
        return fused(*args, **kw)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', counted)

    def run(low):
        attn.zero_grad()
        x.grad = None
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            y = attn(x, pos, blocked, *others)
        y.float().square().mean().backward()
        return [y.detach().float(), x.grad.clone(), *(p.grad.clone() for p in attn.parameters())]

    want = run(False)
    assert len(calls) == 1
    got = run(True)
    assert len(calls) == 1
    for a, b in zip(got, want):
        assert a.isfinite().all() and (a - b).abs().max() < 0.03 * b.abs().max() + 1e-3
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        attn(x, pos, blocked, *others)
    assert len(calls) == 2
    x2 = x.detach().clone()
    x2[:, :4] += 1  # blocked for the rows after them
    with torch.autocast('cpu', torch.bfloat16):
        a, b = (attn(v.requires_grad_(), pos, blocked, *others) for v in (x, x2))
    assert torch.equal(a[:, 4:], b[:, 4:]) and not torch.equal(a[:, :4], b[:, :4])
