"""Every detector against its counterpart in transformers: training step and inference at equal sizes.

Both have random weights and a ResNet-18 whose stem and first stage are frozen. transformers has no DINO: its
two-stage Deformable-DETR stands beside ours, which computes denoising queries on top of that."""

import re
import torch
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.deformable_detr import DeformableDETRConfig
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig
from semidetr.detectors.detr import DETRConfig
from semidetr.detectors.from_detr import DETECTORS
from semidetr.detectors.transformer import TransformerConfig
from semidetr.matching.losses import CriterionConfig, set_criterion
from semidetr.train.optim import build_optimizer, lr_factor
from semidetr.train.trainer import clip_and_step
from deformable_detr import CLASSES, RESNETS, scene
from step import OPTIM, their_step
from timing import compare, interleave, need_op

WIDTH, HEADS, LAYERS, FFN, QUERIES, LEVELS, POINTS = 128, 8, 3, 512, 100, 4, 4
FORMS = 'plain', 'refine', 'two_stage'
SIDE, BATCH, ROUNDS = 320, 2, 9


def their_backbone(stages):
    from transformers import ResNetConfig

    kind, stem, widths, depths = RESNETS['resnet18']
    sizes = dict(embedding_size=stem, hidden_sizes=list(widths), depths=list(depths))
    return ResNetConfig(layer_type=kind, **sizes, out_features=[f'stage{s}' for s in stages])


def frozen_alike(model):
    "Stem and first stage do not learn, as in ours"
    for name, p in model.named_parameters():
        if '.backbone.' in name:
            p.requires_grad_(
                bool(re.search(r'encoder\.stages\.[123]\.', name)) and 'normalization' not in name
            )
    return model


def their_sizes(width, heads, layers, ffn, queries):
    "What both of their configurations have"
    both = {
        f'{part}_{k}': v for part in ('encoder', 'decoder') for k, v in (('layers', layers), ('ffn_dim', ffn))
    }
    both |= dict(
        encoder_attention_heads=heads, decoder_attention_heads=heads, d_model=width, num_queries=queries
    )
    return both | dict(num_labels=CLASSES, dropout=0.0, auxiliary_loss=True)


def their_deformable(form):
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    two_stage = form == 'two_stage'
    cfg = DeformableDetrConfig(
        backbone_config=their_backbone((2, 3, 4)),
        **their_sizes(WIDTH, HEADS, LAYERS, FFN, QUERIES),
        num_feature_levels=LEVELS,
        encoder_n_points=POINTS,
        decoder_n_points=POINTS,
        with_box_refine=form != 'plain',
        two_stage=two_stage,
        two_stage_num_proposals=QUERIES,
    )
    return frozen_alike(DeformableDetrForObjectDetection(cfg))


def their_detr(ours):
    "DETR of the sizes of our settings"
    from transformers import DetrConfig, DetrForObjectDetection

    sizes = their_sizes(ours.d_model, ours.heads, ours.layers, ours.ffn, ours.num_queries)
    return frozen_alike(DetrForObjectDetection(DetrConfig(backbone_config=their_backbone((4,)), **sizes)))


def our_detr():
    "Settings of DETR"
    sizes = dict(d_model=WIDTH, heads=HEADS, layers=LAYERS, ffn=FFN, num_queries=QUERIES, dropout=0.0)
    return DETRConfig(CLASSES, BackboneConfig('resnet18', 'none', (32,)), **sizes)


def pairs():  # [(name, name of theirs, function that builds theirs, our settings, criterion)]
    "All that are compared"
    body, default = BackboneConfig('resnet18', 'none', (8, 16, 32)), CriterionConfig()
    sizes = dict(d_model=WIDTH, n_heads=HEADS, n_levels=LEVELS, n_points=POINTS, enc_layers=LAYERS)
    sizes |= dict(dec_layers=LAYERS, ffn=FFN, num_queries=QUERIES)
    dino = DetectorConfig(CLASSES, body, TransformerConfig(**sizes), DenoisingConfig(num=40))
    out = [('DINO', 'Deformable-DETR two_stage', lambda: their_deformable('two_stage'), dino, default)]
    sizes = dict(d_model=WIDTH, levels=LEVELS, heads=HEADS, points=POINTS, layers=LAYERS, ffn=FFN)
    for form in FORMS:
        cfg = DeformableDETRConfig(CLASSES, body, **sizes, num_queries=QUERIES, form=form, dropout=0.0)
        name = f'Deformable-DETR {form}'
        out.append((name, name, lambda form=form: their_deformable(form), cfg, default))
    detr, softmax = our_detr(), CriterionConfig(**DETECTORS['detr'].criterion)
    return [*out, ('DETR', 'DETR', lambda: their_detr(detr), detr, softmax)]


def our_step(model, criterion):
    "Forward with denoising queries where there are some, losses, backward, the trainer's optimizer step"
    optimizer, scaler = build_optimizer(model, OPTIM), torch.amp.GradScaler('cpu', enabled=False)
    factor = lr_factor(0, OPTIM)

    def step(images, targets):
        losses = set_criterion(model(images, None, targets), targets, 'o2o', criterion)
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        clip_and_step(optimizer, scaler, OPTIM.clip, factor)

    return step


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(threads, quick, say):
    "A row for the training step and one for the inference of every detector"
    need_op()
    side, rounds, rows = 128 if quick else SIDE, 2 if quick else ROUNDS, []
    images, targets = scene(side, BATCH)
    for name, counterpart, build_theirs, settings, criterion in pairs():
        torch.manual_seed(0)
        theirs, ours = build_theirs().train(), settings.build().train()
        ours = ours.to(memory_format=torch.channels_last)  # as the trainer does
        what = dict(name=name, counterpart=counterpart, threads=threads, side=side, batch=BATCH)
        what['parameters'] = dict(theirs=trainable(theirs), ours=trainable(ours))
        step, mine = their_step(theirs), our_step(ours, criterion)
        jobs = dict(theirs=lambda: step(images, targets), ours=lambda: mine(images, targets))
        new = [timed(jobs, rounds, quantity='training step', **what)]
        theirs.eval()
        ours.eval()
        jobs = dict(theirs=lambda: theirs(images) and None, ours=lambda: ours(images) and None)
        with torch.inference_mode():
            new.append(timed(jobs, rounds, quantity='inference', **what))
        for r in new:
            spent = f"{r['theirs_ms']:.0f} -> {r['ours_ms']:.0f} ms"
            say(f"detectors {name}: {r['quantity']} {r['ratio'][1]:.2f}x ({spent})")
        rows += new
    return dict(rows=rows)


def timed(jobs, rounds, **what):
    t = interleave(jobs, rounds)
    return compare(t['theirs']['all'], t['ours']['all'], **what)
