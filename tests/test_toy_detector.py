"A detector of one's own: settings and a network that honour the contract train with every method"

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from semidetr import Trainer
from semidetr.detectors.contract import split_parameters
from semidetr.detectors.denoising import combine_extras
from semidetr.semi.fit import methods_of
from semidetr.semi.methods import METHODS
from test_contract import check_contract
from test_trainer import tiny
from torch import nn


# --- the whole detector ---------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ToySettings:
    num_classes: int = 0
    d_model: int = 32
    num_queries: int = 12

    def build(self):
        return ToyDetector(self)

    def untrained(self):
        return self


class ToyDetector(nn.Module):
    "Patches as tokens, learned queries, one decoder layer; no query selection, no denoising"

    def __init__(self, cfg):
        super().__init__()
        d = cfg.d_model
        self.backbone = nn.Conv2d(3, d, 16, stride=16)
        self.queries, self.boxes = nn.Embedding(cfg.num_queries, d), nn.Embedding(cfg.num_queries, 4)
        self.layer = nn.TransformerDecoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True)
        self.class_head, self.box_head = nn.Linear(d, cfg.num_classes), nn.Linear(d, 4)

    def encode(self, images, mask=None):
        return SimpleNamespace(features=[self.backbone(images)])

    def decode(self, encoded, extras=(), cached=None):
        memory = encoded.features[0].flatten(2).transpose(1, 2)
        content = self.queries.weight.expand(len(memory), -1, -1)
        reference = self.boxes.weight.expand(len(memory), -1, -1)
        extra_content, extra_boxes, blocked, slices = combine_extras(extras, content.shape[1])
        if extras:
            content = torch.cat([extra_content.to(content), content], 1)
            reference = torch.cat([extra_boxes.to(reference), reference], 1)
        hs = self.layer(content, memory, tgt_mask=blocked)
        logits, boxes = self.class_head(hs), (reference + self.box_head(hs)).sigmoid()

        def part(s):
            return dict(pred_logits=logits[:, s], pred_boxes=boxes[:, s], hs=hs[None, :, s])

        out = part(slice(sum(e.content.shape[1] for e in extras), None))
        found = {e.name: part(slices[e.name]) for e in extras}
        for e in extras:
            p = found[e.name]
            p |= dict(pred_logits=p['pred_logits'][None], pred_boxes=p['pred_boxes'][None], meta=e.meta)
        return out | dict(extra=found)

    def denoise(self, targets):
        return []

    def forward(self, images, mask=None, targets=None):
        return self.decode(self.encode(images, mask))

    def param_groups(self):
        return split_parameters(self)


# --- the end of the detector ----------------------------------------------------------------
def test_it_honours_the_contract():
    check_contract(ToySettings(num_classes=3))


@pytest.mark.parametrize('method', methods_of(ToySettings(), METHODS))
def test_it_trains_with_every_method(tmp_path, method):
    cfg = tiny('run.test=false', 'pseudo.top_k=5', 'pseudo.min_score=0', 'mining.init=all', method=method)
    cfg = dataclasses.replace(cfg, detector=ToySettings())
    run = Trainer(cfg, tmp_path / 'r', progress=False)
    before = [p.detach().clone() for p in run.student.parameters()]
    result = run.fit()
    assert result['config']['detector'] == dict(num_classes=10, d_model=32, num_queries=12)
    assert all(not torch.equal(a, b) for a, b in zip(before, run.student.parameters()))
    rows = [json.loads(line) for line in (tmp_path / 'r' / 'log.jsonl').read_text().splitlines()]
    assert all(row['loss'] > 0 for row in rows if 'loss' in row)
    if method != 'supervised':
        assert rows[-1]['pseudo_boxes'] > 0 and 'loss_unsup_l1' in rows[-1]
    if method == 'semi_detr':
        assert any(row.get('loss_con', 0) > 0 for row in rows)


def test_it_resumes(tmp_path):
    cfg = dataclasses.replace(tiny('run.test=false'), detector=ToySettings())
    Trainer(cfg, tmp_path / 'r', progress=False).fit(until=3)
    assert Trainer(cfg, tmp_path / 'r', progress=False).step == 3
