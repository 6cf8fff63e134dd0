"Images that break, vanish or are too large while a command works"

from pathlib import Path
import pytest
import torch
from PIL import Image
import test_situations_commands
from test_situations_commands import TINY, pictures, train
from semidetr.core import DataError
from semidetr.data.doctor import check_dataset
from semidetr.train.config import override, preset
from semidetr.train.trainer import Trainer

shop = test_situations_commands.shop  # fixture: six images, one box each


def tiny(shop, **settings):
    items = [f'data.data={shop}', 'data.dev=0', 'optim.iters=6', 'run.eval_every=0', *TINY]
    return override(preset('small'), [*items, *(f'{k}={v}' for k, v in settings.items())])


@pytest.mark.parametrize('how', ['cut', 'gone', 'text'])
def test_a_broken_image_saves_the_run_and_it_goes_on(shop, how):
    whole = Trainer(tiny(shop), shop / 'whole', progress=False)
    whole.fit()
    run_, bad = Trainer(tiny(shop), shop / 'run', progress=False), shop / 'images' / '3.png'
    good, one = bad.read_bytes(), run_.method.step

    def step(*args):
        if run_.step == 1:  # in the second iteration a file breaks
            if how == 'gone':
                bad.unlink(missing_ok=True)
            else:
                bad.write_bytes(good[:2000] if how == 'cut' else b'<html>404</html>')
        return one(*args)

    run_.method.step = step
    with pytest.raises(DataError, match='3.png: image 3 cannot be read .* is saved after iteration') as e:
        run_.fit()
    at = run_.step
    assert 2 <= at < 6 and f'after iteration {at}' in str(e.value) and '\n' not in str(e.value)
    bad.write_bytes(good)
    again = Trainer(tiny(shop), shop / 'run', progress=False)
    assert again.step == at
    again.fit()
    for a, b in zip(whole.student.state_dict().values(), again.student.state_dict().values()):
        assert torch.equal(a, b)


def test_a_broken_development_image_costs_no_evaluation(shop):
    settings = {'run.eval_every': 3, 'data.dev': 2}
    run_ = Trainer(tiny(shop, **settings), shop / 'run', progress=False)
    bad = Path(run_.data.dev._ds.folder) / run_.data.dev._ds.files[run_.data.dev.indices[0]]
    good = bad.read_bytes()
    bad.write_bytes(good[:2000])
    with pytest.raises(DataError, match='is saved after iteration 3'):
        run_.fit()
    bad.write_bytes(good)
    again = Trainer(tiny(shop, **settings), shop / 'run', progress=False)
    again.fit()
    assert [h['step'] for h in again.history] == [3, 6]


def test_an_image_that_is_broken_from_the_start_is_named(shop):
    (shop / 'images' / '0.png').write_bytes(b'')
    code, _, err = train(shop, '--data', '.', 'data.dev=0', iters=6)
    assert code == 2 and err.count('\n') == 1 and '0.png: image 0 cannot be read' in err


def test_unlabelled_images_that_are_broken_name_the_setting(shop):
    pictures(shop / 'more', ['a.png', 'b.png', 'c.png'])
    (shop / 'more' / 'b.png').write_bytes((shop / 'more' / 'a.png').read_bytes()[:999])
    words = ['--data', '.', '--unlabelled', 'more', '--method', 'mean_teacher', 'method.burn_in_iters=1']
    code, _, err = train(shop, *words, 'data.dev=0', 'data.skip_broken=0', iters=6, out='a')
    assert code == 2 and 'b.png' in err and 'data.skip_broken=1' in err
    code, out, err = train(shop, *words, 'data.dev=0', 'data.skip_broken=1', iters=6, out='b')
    assert code == 0 and err.count('skipped (1 of at most 1)') == 1


def test_too_large_is_not_broken(shop, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # the limit of 179 megapixels, made small
    code, _, err = train(shop, '--data', '.', 'data.dev=0')
    assert code == 2 and 'too large, not broken' in err and 'scale it down or cut it into tiles' in err
    assert 'restore' not in err and err.count('\n') == 1
    report = check_dataset(str(shop), progress=False)
    assert {f.kind for f in report.errors} == {'too-large'} and 'tiles' in report.errors[0].cure
