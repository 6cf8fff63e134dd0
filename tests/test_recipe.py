"The step of the paper on other numbers of GPUs: images, batches, rate, memory, and the printed command."

import shlex
import pytest
import semidetr.cli.commands  # noqa: F401 (registers the commands)
from semidetr.cli.terminal import shell
from semidetr.core import ConfigError
from semidetr.lab import recipe as R
from semidetr.lab.dry_run import images_per_batch
from semidetr.train.config import PRESETS, config_hash, override, preset


def per_image(gigabytes, fixed=4.0):
    "An estimate that can be computed by hand"
    return lambda cfg: fixed + gigabytes * (cfg.loader.n_labelled + cfg.loader.n_unlabelled)


@pytest.mark.parametrize('gpus', [1, 2, 4, 8])
@pytest.mark.parametrize('name', sorted(R.PROCESSES))
def test_the_published_step_stays(name, gpus):
    "Where the number of GPUs divides eight: images, rate, iterations and T1 are those of the paper"
    r = R.make_recipe(name, gpus, 1.0, estimate=per_image(10.0))
    usual = preset(name)
    assert not r.fits and r.batch == (usual.loader.n_labelled, usual.loader.n_unlabelled)
    assert r.accumulate * gpus == 8 and r.images == r.published == 8 * sum(r.batch)
    assert (r.cfg.optim.lr, r.cfg.optim.iters, r.cfg.method.T1) == (
        usual.optim.lr,
        usual.optim.iters,
        usual.method.T1,
    )
    assert gpus * r.accumulate * images_per_batch(r.cfg) == r.images


@pytest.mark.parametrize(
    'gpus, memory, batch, accumulate',
    [(1, 14, (1, 4), 8), (1, 13.9, (1, 4), 8), (1, 24, (2, 8), 4), (1, 84, (8, 32), 1), (2, 84, (4, 16), 1)],
)
def test_the_largest_batch_that_fits(gpus, memory, batch, accumulate):
    "4 GB and 2 GB per image: 5 images take 14 GB, 10 take 24, 20 take 44, 40 take 84"
    r = R.make_recipe('coco-10', gpus, memory, estimate=per_image(2.0))
    assert (r.batch, r.accumulate, r.fits) == (batch, accumulate, memory >= 14)
    assert r.gigabytes == 4 + 2 * sum(batch) and r.images == 40


def test_eight_gpus_need_no_setting():
    r = R.make_recipe('coco-10', 8, 24, estimate=per_image(2.0))
    assert r.items == () and config_hash(r.cfg) == config_hash(preset('coco-10'))


@pytest.mark.parametrize('gpus, images, factor', [(3, 45, 1.125), (16, 80, 2.0), (5, 50, 1.25)])
def test_other_numbers_of_gpus(gpus, images, factor):
    "More images per step than published: the rate grows with them, the iterations shrink"
    r = R.make_recipe('coco-10', gpus, 14, estimate=per_image(2.0))
    assert r.images == images and r.cfg.optim.lr == pytest.approx(1e-4 * factor, rel=5e-3)
    assert r.cfg.optim.iters == round(120_000 / factor) and r.cfg.method.T1 == round(60_000 / factor)


def test_fewer_images():
    "A quarter of the images: a quarter of the rate, four times the iterations; steps of the schedule too"
    r = R.make_recipe('coco-full', 1, 24, 16, estimate=per_image(2.0))
    assert (r.images, r.batch, r.accumulate) == (16, (4, 4), 2) and r.cfg.optim.steps == (480_000, 640_000)
    assert (r.cfg.optim.lr, r.cfg.optim.iters, r.cfg.method.T1) == (2.5e-5, 960_000, 480_000)


def test_own_settings_stay():
    r = R.make_recipe('voc', 16, 99, 0, ('optim.lr=3e-4', 'view.max_side=1000'), per_image(2.0))
    assert r.cfg.optim.lr == 3e-4 and r.cfg.optim.iters == 40_000 and r.cfg.view.max_side == 1000
    with pytest.raises(ConfigError, match='optim.accumulate follows from'):
        R.make_recipe('voc', settings=('optim.accumulate=3',), estimate=per_image(2.0))


@pytest.mark.parametrize(
    'values, why',
    [
        (dict(name='small'), "'small' is for one process as it is"),
        (dict(name='coco-11'), "'coco-11' is unknown"),
        (dict(gpus=0), 'give positive numbers'),
        (dict(memory=0.0), 'give positive numbers'),
        (dict(memory=float('nan')), 'give positive numbers'),
        (dict(images=-1), 'give positive numbers'),
        (dict(settings=('optim.irts=3',)), 'unknown setting'),
    ],
)
def test_errors_are_one_line(values, why):
    with pytest.raises(ConfigError, match=why) as e:
        R.make_recipe(**values, estimate=per_image(2.0))
    assert '\n' not in str(e.value)


def test_every_preset_of_the_paper_has_a_recipe():
    assert set(R.PROCESSES) == {name for name in PRESETS if name.startswith(('coco', 'voc'))}


@pytest.mark.parametrize('gpus, images', [(1, 0), (2, 0), (3, 0), (1, 16)])
def test_the_printed_command_gives_the_recipe(gpus, images):
    "Its settings, applied to its preset, are the configuration that was estimated"
    r = R.make_recipe('coco-5', gpus, 24, images, ('view.max_side=1000',), per_image(2.0))
    lines = R.recipe_lines(r, 24)
    words = shlex.split(lines[-1])
    assert (words[0] == 'semidetr') == (gpus == 1) and words[words.index('--preset') + 1] == 'coco-5'
    assert gpus == 1 or words[words.index('--nproc-per-node') + 1] == str(gpus)
    items = [w for w in words if '=' in w]
    assert config_hash(override(preset('coco-5'), items)) == config_hash(r.cfg)
    assert any('linear' in line for line in lines) == (r.images != 40)
    assert any('mining.memory' in line for line in lines) == (r.accumulate > 1)


def test_command(monkeypatch, capsys, tmp_path):
    "Its lines, its exit codes"
    made = R.make_recipe
    monkeypatch.setattr(R, 'make_recipe', lambda *values: made(*values, per_image(3.0)))
    assert shell('semidetr recipe --gpus 1 --memory 24', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'optim.accumulate=8' in out and 'about 19.0 of 24 GB' in out
    assert '1 process, 8 batches of 1 + 4' in out
    assert shell('semidetr recipe --memory 12', tmp_path) == 1
    assert 'this does not fit' in capsys.readouterr().out
    assert shell('semidetr recipe --memory 0', tmp_path) == 2
    assert shell('semidetr recipe --preset digits', tmp_path) == 2
