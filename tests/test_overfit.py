"DETR and single-stage Deformable-DETR learn two images by heart"

import os
import pytest
from semidetr.train.config import override, preset, with_detector
from semidetr.train.trainer import Trainer

SETTINGS = [
    'data.data=digits:n=2,size=64',
    'data.dev=0',
    'data.count=0',
    'method.name=supervised',
    'method.T1=0',  # DETR as published: one-to-one from the start
    'run.test=false',
    'view.short_sides=[64]',
    'view.eval_short=64',
    'view.flip=0',
    'optim.lr=1e-3',
    'optim.schedule=cosine',
    'loader.n_labelled=2',
    'loader.num_workers=0',
    'ema.decay=.9',
]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('SEMIDETR_SLOW'), reason='a minute of training: SEMIDETR_SLOW=1')
@pytest.mark.parametrize('name,iters', [('detr', 250), ('deformable_detr', 200)])
def test_overfits_two_images(tmp_path, name, iters):
    "AP above .9 on the two images that it trains on; the detector is the small one"
    base = override(preset('digits'), ['detector.transformer.num_queries=30'])
    cfg = override(with_detector(base, name), [*SETTINGS, f'optim.iters={iters}'])
    run = Trainer(cfg, tmp_path / 'r', progress=False)
    run.fit()
    assert run.evaluate(run.data.labelled)['teacher']['AP'] > 90
