"Configuration: round trip, overrides, errors that name the cure, hash"

import dataclasses, hashlib, json
import pytest
from semidetr.train.config import (
    LEGACY_DEFAULTS,
    PRESETS,
    RENAMED,
    UNHASHED,
    Config,
    config_hash,
    from_dict,
    from_saved,
    load_config,
    override,
    preset,
    to_dict,
)
from semidetr.core import ConfigError


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_presets_survive_json(name):
    cfg = preset(name)
    back = from_dict(json.loads(json.dumps(to_dict(cfg))))
    assert back == cfg and config_hash(back) == config_hash(cfg)


def test_paper_settings():
    c = preset('coco-10')
    assert (c.optim.lr, c.optim.backbone_mult, c.optim.weight_decay, c.optim.clip) == (1e-4, 0.1, 1e-4, 0.1)
    assert (
        c.method.T1,
        c.optim.iters,
        c.method.unsup_weight,
        c.loader.n_labelled,
        c.loader.n_unlabelled,
    ) == (60_000, 120_000, 4.0, 1, 4)
    assert (c.criterion.w_cls, c.criterion.cost_l1, c.criterion.w_giou, c.criterion.k) == (2.0, 5.0, 2.0, 13)
    full = preset('coco-full')
    assert (full.optim.steps, full.method.unsup_weight, full.loader.n_labelled, full.loader.n_unlabelled) == (
        (120_000, 160_000),
        2.0,
        4,
        4,
    )
    assert (preset('voc').method.T1, preset('voc').optim.iters) == (40_000, 80_000)


def test_override_types():
    c = override(
        Config(),
        [
            'optim.lr=1e-3',
            'optim.iters=7',
            'data.data=a/b',
            'data.cover_classes=true',
            'optim.steps=[1,2]',
            'run.init=12',
        ],
    )
    assert (c.optim.lr, c.optim.iters, c.data.data, c.data.cover_classes, c.optim.steps, c.run.init) == (
        1e-3,
        7,
        'a/b',
        True,
        (1, 2),
        '12',
    )


@pytest.mark.parametrize(
    'item,words',
    [
        ('optim.lrr=1', ["optim.lrr", "did you mean 'optim.lr'"]),
        ('optim.iters=1.5', ['optim.iters', 'int']),
        ('optim.lr=fast', ['optim.lr', 'float']),
        ('lr', ['group.field=value']),
        ('optim=3', ['optim', 'group']),
        ('method.name=mean_teacer', ["did you mean 'mean_teacher'"]),
        ('method.unsup_cdn=sometimes', ['stage2']),
    ],
)
def test_errors_name_the_cure(item, words):
    with pytest.raises(ConfigError) as e:
        override(Config(), [item])
    assert all(w in str(e.value) for w in words), str(e.value)


BAD = {
    'optim.iters': '0 -3',
    'optim.lr': '-1 0 NaN Infinity',
    'optim.backbone_mult': '-1',
    'optim.weight_decay': '-1',
    'optim.clip': '-1 NaN',
    'optim.warmup': '-1',
    'optim.accumulate': '0',
    'run.threads': '-1',
    'run.eval_every': '-1',
    'run.eval_nms': '-1 2',
    'run.checkpoint_every': '0',
    'run.log_every': '0 -1',
    'run.health_window': '0',
    'data.percent': '120 -1',
    'data.count': '-1',
    'data.fold': '-1',
    'data.dev': '-1',
    'loader.n_labelled': '0',
    'loader.n_unlabelled': '-1',
    'loader.num_workers': '-1',
    'ema.decay': '5 -0.1',
    'ema.warmup': '-1',
    'ema.start': '-2',
    'pseudo.threshold': '-1 NaN',
    'pseudo.nms': '2 -1',
    'pseudo.cross_nms': '2',
    'pseudo.min_score': '-1',
    'pseudo.top_k': '0',
}


@pytest.mark.parametrize('item', [f'{k}={v}' for k, values in BAD.items() for v in values.split()])
def test_impossible_numbers(tmp_path, item):
    "On the command line, in a file and in Python: one line that names the setting"
    name, _, value = item.partition('=')
    with pytest.raises(ConfigError, match=f'{name}=.* must (be at least|lie between|be above) ') as e:
        override(preset('digits'), [item])
    assert '\n' not in str(e.value)
    group, key = name.split('.')
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(getattr(Config(), group), **{key: float(value)})
    f = tmp_path / 'c.json'
    f.write_text(json.dumps({group: {key: json.loads(value)}}))
    with pytest.raises(ConfigError, match=f'c.json: {name}='):
        load_config(f)


@pytest.mark.parametrize(
    'item',
    [
        'optim.clip=0',
        'optim.backbone_mult=0',
        'optim.warmup=0',
        'loader.n_unlabelled=0',
        'loader.num_workers=0',
        'run.eval_every=0',
        'run.eval_nms=0',
        'run.threads=0',
        'ema.decay=0',
        'ema.decay=1',
        'ema.start=-1',
        'pseudo.threshold=0',
        'pseudo.threshold=2',
        'pseudo.min_score=0',
        'pseudo.nms=1',
        'pseudo.cross_nms=1',
        'pseudo.min_side=-1',
        'data.percent=0',
        'data.percent=100',
        'data.count=0',
        'data.dev=0',
    ],
)
def test_numbers_at_the_border(item):
    "What means none, all, or as in the published code stays legal, in every preset"
    for name in PRESETS:
        override(preset(name), [item])


def test_files(tmp_path):
    f = tmp_path / 'c.toml'
    f.write_text('[optim]\nlr = 0.5\n')
    assert load_config(f, preset('digits')).optim.lr == 0.5
    f.write_text('[optim]\nlrate = 0.5\n')
    with pytest.raises(ConfigError, match='c.toml.*lrate'):
        load_config(f)
    f.write_text('[optim\n')
    with pytest.raises(ConfigError, match='c.toml'):
        load_config(f)
    with pytest.raises(ConfigError, match='no such'):
        load_config(tmp_path / 'none.toml')


def test_hash_ignores_only_what_changes_no_number():
    h = config_hash(Config())
    assert (
        config_hash(override(Config(), ['ema.start=0', 'mining.rate_window=3']))
        == h
        != config_hash(override(Config(), ['ema.start=5']))
    )  # young settings that change nothing
    started, rated = ['run.init=x'], ['mining.sup_filter=class_rate']
    assert config_hash(override(Config(), started)) != config_hash(
        override(Config(), [*started, 'ema.start=0'])
    ) and config_hash(override(Config(), rated)) != config_hash(
        override(Config(), [*rated, 'mining.rate_window=3'])
    )
    assert config_hash(override(Config(), ['run.device=cpu', 'loader.num_workers=7', 'run.log_every=3'])) == h
    assert (
        config_hash(override(Config(), ['run.seed=1']))
        != h
        != config_hash(override(Config(), ['optim.lr=1e-3']))
    )


def test_every_field_is_documented():
    "A field without a comment is a setting that nobody can choose"
    import inspect, re
    from semidetr.train import config
    from semidetr.semi import methods
    from semidetr.semi import teacher

    for cls in (
        config.DataConfig,
        config.LoaderConfig,
        config.OptimConfig,
        config.RunConfig,
        methods.MethodConfig,
        teacher.EmaConfig,
        teacher.PseudoConfig,
    ):
        assert cls.__doc__
        for f in dataclasses.fields(cls):
            assert re.search(rf'^    {f.name}:', inspect.getsource(cls), re.M)


def test_renamed_settings_keep_hashes_and_answer_with_their_new_name():
    "Records and checkpoints with old names are read; a new configuration with one is told the new one"
    values = to_dict(preset('digits'))
    old = json.loads(json.dumps(values))
    for now, before in RENAMED.items():
        group, key = now.split('.')
        old[group][before.split('.')[1]] = old[group].pop(key)
        with pytest.raises(ConfigError, match=f"it is called '{now}' now"):
            override(Config(), [f'{before}=1'])
    assert from_saved(old) == from_saved(values) == preset('digits')
    for name in (*UNHASHED, *LEGACY_DEFAULTS):
        group, key = name.split('.')
        old[group].pop(key, None)
    old = {group: values for group, values in old.items() if values}
    text = json.dumps(old, sort_keys=True)
    assert config_hash(preset('digits')) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_a_second_detector_is_refused():
    "Criterion and learning rates that the first one brought would stay"
    for name in ('digits', 'coco-10'):
        base = preset(name)
        for first, second in (('detr', 'dino'), ('deformable_detr', 'detr'), ('deformable_detr', 'dino')):
            cfg = override(base, [f'detector={first}'])
            with pytest.raises(ConfigError, match=f'detector={second}: .* already; start from a preset'):
                override(cfg, [f'detector={second}'])
            assert override(cfg, [f'detector={first}']) == cfg
        assert override(base, ['detector=dino_5scale', 'detector=dino']).criterion == base.criterion
