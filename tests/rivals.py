"Tiny runs of the detectors with anchors and points, for several test files."

from semidetr.train.config import override, preset, with_detector
from test_trainer import TINY

OWN = dict(
    faster_rcnn=[
        'detector.d_model=32',
        'detector.hidden=32',
        'detector.roi_samples=32',
        'detector.proposals=50',
    ],
    fcos=['detector.d_model=64', 'detector.convs=1'],
)
FILTERS = dict(  # so low that an untrained teacher has pseudo labels, and so high that it has none
    boxes=['method.candidate_score=0', 'method.class_score=0', 'method.max_uncertainty=9'],
    empty=['method.candidate_score=1'],
)
MATCHING = dict(
    soft_teacher=FILTERS['boxes'],
    dense_teacher=['view.strong=photometric', 'method.dense_ratio=.2', 'pseudo.threshold=0'],
)


def rival(name, method, *more):
    "Settings of six iterations, two of them burn-in"
    own = [item for item in TINY if not item.startswith('detector.')]
    cfg = with_detector(override(preset('digits'), own), name)
    first = f'method.name={method}', 'pseudo.top_k=5', 'pseudo.threshold=0', 'pseudo.min_score=0'
    return override(
        cfg, [*first, 'detector.backbone.weights=none', *OWN[name], *MATCHING.get(method, []), *more]
    )
