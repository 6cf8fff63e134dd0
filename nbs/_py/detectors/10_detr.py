# %% [markdown]
# # DETR {#sec-detr}
#
# > Build the first detection transformer, whose queries attend to the whole image, and read its weights.
#
# *Why.* Before DETR (Carion et al. 2020) a detector classified a dense grid of *anchors*: boxes of hand-made
# sizes and shapes, thousands per image, each with a rule for which object it belongs to, and a suppression of
# repeated boxes at the end. DETR has none of it. A hundred learned queries attend to the image and to each
# other, each predicts one object or none, and a one-to-one matching (@sec-matching) decides which query is
# trained with which object. All later detectors of this book are descendants. As the simplest of the family
# it is the baseline to which each later idea is compared.
#
# | part | DETR | what later detectors changed |
# |---|---|---|
# | features | one map of stride 32 (or 16, *DC5*) | a pyramid: small objects need fine maps (@sec-deformable-detr) |
# | attention to the image | every token | a few samples near the query (@sec-attention) |
# | start of a query | a learned vector, the same for every image | a point, a box, a proposal of the encoder |
# | box of a layer | predicted anew in each layer | a correction of the box of the layer before |
# | score | softmax with a class *no object* | a sigmoid for each class |
# | training of the release | 300 to 500 epochs | 50 (Deformable-DETR), 12 to 36 (DINO, with denoising) |

# %%
#| default_exp detectors.detr

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
from dataclasses import dataclass, replace
import torch
from torch import nn, Tensor
from semidetr.core import ConfigError, at_least_float32, one_of
from semidetr.detectors.backbone import BackboneConfig, build_backbone
from semidetr.detectors.contract import Outputs, split_parameters
from semidetr.detectors.deformable_detr import check_fit
from semidetr.detectors.denoising import combine_extras
from semidetr.detectors.detector import collect_outputs, level_masks
from semidetr.detectors.self_attention import SelfAttention
from semidetr.detectors.transformer import MLP, TransformerConfig, _FeedForward, _kept_geometry
from semidetr.detectors.transformer import sine_embed_boxes

# %%
import matplotlib.pyplot as plt
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from semidetr.boxes import denormalize_boxes, normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import DetectionTransformer, build_detector
from semidetr.detectors.denoising import ExtraQueries
from semidetr.detectors.transformer import cell_centres, token_geometry
from semidetr.draw import COLORS, draw_boxes, show_image


# %% [markdown]
# ## Settings
#
# The sizes are those of the release. Its second model, DC5, has twice the resolution: stage 4 of the ResNet
# keeps stride 16 (@sec-backbone).

# %%
#| export
@dataclass(frozen=True)
class DETRConfig:
    "Everything that determines the network; the defaults are those of the release"

    num_classes: int  # C, without the no-object class; 0 in a configuration means: as many as the data have
    backbone: BackboneConfig = BackboneConfig('resnet50', out_strides=(32,))  # with one map
    d_model: int = 256  # width d of every token and query, a multiple of 4 and of heads
    heads: int = 8  # M
    layers: int = 6  # of the decoder
    enc_layers: int | None = None  # of the encoder; None: as many as the decoder has
    ffn: int = 2048  # hidden width of the feed-forward blocks
    num_queries: int = 100  # Q
    dropout: float = 0.1  # of attention weights, after attention and in feed-forward blocks
    kind: str = 'detr'  # tells these settings from others in a file

    def __post_init__(self):
        one_of('detector', self, kind=('detr',))
        if self.num_classes < 0:
            raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        if len(self.backbone.out_strides) != 1:
            raise ConfigError(
                f'DETR has one map: give one of backbone.out_strides={self.backbone.out_strides}'
            )
        self.transformer  # checks the other sizes

    @property
    def transformer(self) -> TransformerConfig:
        "The same sizes for the shared layers"
        return TransformerConfig(
            d_model=self.d_model,
            n_heads=self.heads,
            n_levels=1,
            enc_layers=self.layers if self.enc_layers is None else self.enc_layers,
            dec_layers=self.layers,
            ffn=self.ffn,
            dropout=self.dropout,
            num_queries=self.num_queries,
        )

    def build(self) -> nn.Module:  # DETR
        "The network of these settings"
        return DETR(self)

    def untrained(self) -> 'DETRConfig':
        "The same settings with random weights for the backbone"
        return replace(self, backbone=replace(self.backbone, weights='none'))


# %%
#| export
def detr_r50(
    num_classes: int,  # C
    dc5: bool = False,  # stage 4 without stride: a map of stride 16 instead of 32
) -> DETRConfig:
    "The release: ResNet-50, 6+6 layers of width 256, 100 queries"
    if dc5:
        return DETRConfig(num_classes, BackboneConfig('resnet50_dc5', out_strides=(16,)))
    return DETRConfig(num_classes)


def detr_small(
    num_classes: int,  # C
) -> DETRConfig:
    "For a few CPU cores: EfficientNet-Lite0 at stride 16, 1+3 layers of width 128, 50 queries"
    sizes = dict(d_model=128, layers=3, enc_layers=1, ffn=512, num_queries=50, dropout=0.0)
    return DETRConfig(num_classes, BackboneConfig('efficientnet_lite0', out_strides=(16,)), **sizes)


# %%
try:
    DETRConfig(91, BackboneConfig('resnet50', out_strides=(16, 32)))
except ConfigError as error:
    message = str(error)
assert 'DETR has one map' in message and detr_r50(91, dc5=True).backbone.out_strides == (16,)
message


# %% [markdown]
# ## Encoder
#
# The map becomes a sequence of tokens $X$, with their position codes $P$ (@eq-backbone-sine, temperature 10000).
# Every token attends to every other one, which is affordable on a single coarse map: the number of pairs
# grows with the fourth power of the resolution. Tokens of padding are hidden from all others:
#
# $$
# X \leftarrow \mathrm{LN}\big(X + \operatorname{MHA}(q=X+P,\; k=X+P,\; v=X)\big), \qquad
# X \leftarrow \mathrm{LN}\big(X + \mathrm{FFN}(X)\big)
# $$ {#eq-detr-encoder}

# %%
#| export
def _attention(cfg):
    return nn.MultiheadAttention(cfg.d_model, cfg.n_heads, cfg.dropout, batch_first=True)


def attend(
    attention: nn.MultiheadAttention,  # batch first
    q: Tensor,  # (B,N,d)
    k: Tensor,  # (B,S,d)
    v: Tensor,  # (B,S,d)
    padding: Tensor = None,  # (B,S) bool, True: no query attends to this key
) -> Tensor:  # (B,N,d)
    "Attention of every query to every token that is not padding"
    return attention(q, k, v, key_padding_mask=padding, need_weights=False)[0]


class DETREncoderLayer(_FeedForward):
    "Self-attention of all tokens, then a feed-forward block; LayerNorm after each (@eq-detr-encoder)"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.self_attn = _attention(cfg)
        self.norm1, self.norm2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self._build_ffn(cfg)

    def forward(
        self,
        x: Tensor,  # (B,S,d) tokens
        pos: Tensor,  # (B or 1, S, d) position codes
        padding: Tensor = None,  # (B,S) bool, True=padding
    ) -> Tensor:  # (B,S,d)
        x = self.norm1(x + self.dropout(attend(self.self_attn, x + pos, x + pos, x, padding)))
        return self.norm2(x + self._ffn(x))


# %% [markdown]
# Padding has no influence on the valid tokens, whatever it holds:

# %%
torch.manual_seed(0)
toy_cfg = TransformerConfig(d_model=16, n_heads=2, n_levels=1, enc_layers=1, dec_layers=2, ffn=32)
toy_layer, toy_tokens, toy_pos = DETREncoderLayer(toy_cfg), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
last_two = torch.tensor([[False] * 4 + [True] * 2])
with_padding = toy_layer(toy_tokens, toy_pos, last_two)[:, :4]
without = toy_layer(toy_tokens[:, :4], toy_pos[:, :4])
assert torch.allclose(with_padding, without, atol=1e-6)
(with_padding - without).abs().max().item()


# %% [markdown]
# ## Decoder
#
# A query has a position $q$, a row of a learned table, which is the same in all layers, and a content $t$ that
# starts at *zero*. In a layer the queries attend to each other, then to all tokens $M$ of the encoder:
#
# $$
# \begin{aligned}
# t &\leftarrow \mathrm{LN}_1\big(t + \operatorname{MHA}(t+q,\; t+q,\; t)\big) \\
# t &\leftarrow \mathrm{LN}_2\big(t + \operatorname{MHA}(t+q,\; M+P,\; M)\big) \\
# t &\leftarrow \mathrm{LN}_3\big(t + \mathrm{FFN}(t)\big)
# \end{aligned}
# $$ {#eq-detr-decoder}
#
# Note the order of the norms: in Deformable-DETR and DINO `norm2` belongs to the self-attention and `norm1` to
# the attention to the image. The heads get $t$ after one more LayerNorm, shared by all layers; the next layer
# gets $t$ as it is.

# %%
#| export
class DETRDecoderLayer(_FeedForward):
    "Self-attention of the queries, attention to all tokens, feed-forward; LayerNorm after each"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.self_attn = SelfAttention(cfg.d_model, cfg.n_heads, cfg.dropout)
        self.multihead_attn = _attention(cfg)
        for name in ('norm1', 'norm2', 'norm3'):
            setattr(self, name, nn.LayerNorm(cfg.d_model))
        self._build_ffn(cfg)

    def forward(
        self,
        x: Tensor,  # (B,N,d) content of the queries
        pos: Tensor,  # (B,N,d) their positions
        keys: Tensor,  # (B,S,d) tokens plus their positions
        memory: Tensor,  # (B,S,d) tokens after the encoder
        padding: Tensor = None,  # (B,S) bool, True=padding
        blocked: Tensor = None,  # (N,N) bool, True: row may not attend to column
        others=None,  # (content, pos) of further queries, as in `SelfAttention`
    ) -> Tensor:  # (B,N,d)
        x = self.norm1(x + self.dropout(self.self_attn(x, pos, blocked, others)))
        x = self.norm2(x + self.dropout(attend(self.multihead_attn, x + pos, keys, memory, padding)))
        return self.norm3(x + self._ffn(x))


class DETREncoder(nn.Module):
    "A stack of encoder layers; no norm after the last"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(DETREncoderLayer(cfg) for _ in range(cfg.enc_layers))

    def forward(
        self,
        x: Tensor,  # (B,S,d) tokens
        pos: Tensor,  # (B or 1, S, d) position codes
        padding: Tensor = None,  # (B,S) bool, True=padding
    ) -> Tensor:  # (B,S,d)
        for layer in self.layers:
            x = layer(x, pos, padding)
        return x


class DETRDecoder(nn.Module):
    "A stack of decoder layers, and the LayerNorm between them and the heads"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(DETRDecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.norm = nn.LayerNorm(cfg.d_model)

    def forward(
        self,
        x: Tensor,  # (B,N,d) content of the queries
        pos: Tensor,  # (B,N,d) their positions
        memory: Tensor,  # (B,S,d) tokens after the encoder
        token_pos: Tensor,  # (B or 1, S, d) position codes of the tokens
        padding: Tensor = None,  # (B,S) bool, True=padding
        blocked: Tensor = None,  # (N,N) bool, True: row may not attend to column
        states=None,  # of an earlier pass over the same memory: its queries are attended to as well
    ) -> tuple:  # (hs (layers,B,N,d), states: (content, pos) before each layer)
        "Outputs of all layers after the norm, and the inputs of all layers"
        keys, hs, new_states = memory + token_pos, [], []
        for i, layer in enumerate(self.layers):
            new_states.append((x, pos))
            x = layer(x, pos, keys, memory, padding, blocked, None if states is None else states[i])
            hs.append(self.norm(x))
        return torch.stack(hs), new_states


# %% [markdown]
# Since all contents start at zero, so do all values of the first self-attention: whatever a query attends to, it
# gets the same bias. The first layer's attention among queries has no effect, and its weights for queries
# and keys get a gradient of exactly zero:

# %%
torch.manual_seed(0)
toy_decoder = DETRDecoder(toy_cfg)
zeros, toy_table, toy_memory = torch.zeros(1, 5, 16), torch.randn(1, 5, 16), torch.randn(1, 6, 16)
toy_hs, _ = toy_decoder(zeros, toy_table, toy_memory, toy_pos)
(toy_hs * torch.randn_like(toy_hs)).sum().backward()
first, second = (layer.self_attn.in_proj_weight.grad.abs().max().item() for layer in toy_decoder.layers)
assert first < 1e-8 and second > 1e-4
first, second


# %% [markdown]
# ## Extra queries
#
# Cross-view queries (@sec-consistency) bring content and a box; DETR has no layer that turns a box into a
# position. Their position is therefore the code of the centre of the box, in the code of the tokens. That code
# counts cells from 1 to $n$, so cell $i$, whose centre lies at $c=(i-\frac12)/n$, has the angle
#
# $$
# \theta = 2\pi\,\frac{i}{n} = 2\pi\left(c+\frac{1}{2n}\right)
# $$ {#eq-detr-centre}
#
# The second form holds for any $c$, and has no weights: the state dict stays that of the original.
#
# ::: {.callout-note}
# ## Paper vs. code
# The original has no extra queries, so their treatment is ours. Size and shape of the box are not used:
# the box head predicts a box, not a correction, so a box of an extra query only says where to look.
# :::

# %%
#| export
def centre_code(
    boxes: Tensor,  # (B,P,4) cxcywh in [0,1] of the image
    cells: Tensor,  # (B or 1, 2) valid width and height of the map, in cells
    d_model: int,  # d
) -> Tensor:  # (B,P,d)
    "Position code of the centre of each box, in the code of the tokens (@eq-detr-centre)"
    centre = boxes[..., :2] + 0.5 / cells[:, None].to(boxes)
    return sine_embed_boxes(torch.cat([centre, centre], -1), d_model // 2)[..., :d_model]


# %%
#| export
POSITION = dict(temperature=10000.0)  # of the tokens (@eq-backbone-sine)

# %%
code_map = [(12, 16)]
code_geo = token_geometry(code_map, 64, **POSITION)
code_cells = torch.tensor([[16.0, 12.0]])
of_cells = centre_code(cell_centres(code_map, code_cells[:, None]).repeat(1, 1, 2), code_cells, 64)
assert torch.allclose(of_cells, code_geo.position, atol=1e-5)
(of_cells - code_geo.position).abs().max().item()

# %%
#| label: fig-detr-centre
#| fig-cap: "Dot product of the code of an extra query with the codes of all tokens, for three boxes. The largest value lies at the centre of the box, and neither size nor shape counts."
#| fig-alt: "Three heat maps of 12 by 16 cells, each with a box; the brightest cell lies at the centre of the box"
code_boxes = torch.tensor([[[0.28, 0.375, 0.4, 0.3], [0.66, 0.625, 0.2, 0.7], [0.78, 0.21, 0.3, 0.2]]])
similarity = (centre_code(code_boxes, code_cells, 64)[0] @ code_geo.position[0].T).view(3, 12, 16)
fig, axes = plt.subplots(1, 3, figsize=(6, 1.7), dpi=80, layout='constrained')
for ax, s, box in zip(axes, similarity, code_boxes[0]):
    peak = torch.tensor([s.argmax() % 16 + 0.5, s.argmax() // 16 + 0.5])
    assert ((peak - box[:2] * code_cells[0]).abs() <= 0.51).all()
    ax.imshow(s, extent=(0, 16, 12, 0))
    draw_boxes(ax, denormalize_boxes(box[None], (12, 16)), kind='student')
    ax.plot(*peak, 'o', ms=4, color=COLORS['teacher'])
    ax.axis('off')
plt.show()


# %% [markdown]
# ## Encoded images
#
# One pass of backbone and encoder serves any number of decoder passes.

# %%
#| export
@dataclass
class EncodedMap:
    "A batch of images after the encoder: all that any number of decoder passes need"

    features: list  # one map (B,d,h,w): before the encoder
    memory: Tensor  # (B,S,d) tokens after it
    position: Tensor  # (B or 1, S, d) position codes of the tokens
    padding_mask: Tensor  # (B,S) bool, True=padding; None: no padding
    cells: Tensor  # (B or 1, 2) valid width and height of the map, in cells
    enc_logits: None = None  # no proposals of the encoder


class DETRTransformer(nn.Module):
    "Encoder and decoder"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.encoder, self.decoder, self._cache = DETREncoder(cfg), DETRDecoder(cfg), {}
        self.reset_parameters()

    def reset_parameters(self):
        "Xavier for every matrix"
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def encode(
        self,
        feature: Tensor,  # (B,d,h,w)
        masks=None,  # a list of one mask (B,h,w), True=padding; None: no padding
    ) -> EncodedMap:
        "Tokens of the map through the encoder"
        geo = _kept_geometry(self._cache, [feature], masks, **POSITION)
        pos, (h, w) = geo.position.to(feature.dtype), feature.shape[-2:]
        cells = torch.tensor([[w, h]], device=feature.device, dtype=torch.float32)
        if geo.valid_ratios is not None:
            cells = cells * geo.valid_ratios[:, 0]
        memory = self.encoder(feature.flatten(2).transpose(1, 2), pos, geo.padding)
        return EncodedMap([feature], memory, pos, geo.padding, cells)


# %% [markdown]
# ## Heads and scores
#
# The class head has $C+1$ logits; the last one means *no object*. So the contract (@sec-contract) gets
# `scores`, the probabilities of the first $C$ classes (@eq-contract-score), in every prediction. The box is
# $\sigma(\mathrm{MLP}(t))$, without any reference. Both heads start at the default of torch: with a class for
# *no object* a prior is not needed.

# %%
#| export
def add_scores(
    predictions,  # dicts with pred_logits (..., C+1); `scores` is added in place
):
    "Probabilities of the classes, without that of no object: (..., C), at least float32"
    for p in predictions:
        p['scores'] = at_least_float32(p['pred_logits']).softmax(-1)[..., :-1]


# %%
undecided = dict(pred_logits=torch.tensor([2.0, 0.0, 2.0]))
add_scores([undecided])
assert torch.allclose(undecided['scores'], torch.tensor([0.4683, 0.0634]), atol=1e-4)
undecided['scores']


# %%
#| export
class DETR(nn.Module):
    "The first detection transformer, with room for extra queries"

    def __init__(self, cfg: DETRConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.d_model
        self.backbone = build_backbone(cfg.backbone)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], d, 1)
        self.transformer = DETRTransformer(cfg.transformer)
        self.query_embed = nn.Embedding(cfg.num_queries, d)
        self.class_embed, self.bbox_embed = nn.Linear(d, cfg.num_classes + 1), MLP(d, d, 4, 3)

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding; None: nothing is padded
    ) -> EncodedMap:
        "Everything before the queries; one pass serves any number of `decode`"
        feature = self.input_proj(self.backbone(images)[-1])
        return self.transformer.encode(feature, level_masks(mask, [feature]))

    def queries(
        self,
        encoded: EncodedMap,  # from `encode`
        extras=(),  # list of `ExtraQueries`
        alone: bool = False,  # only the extra ones
    ) -> tuple:  # (content (B,N,d), pos (B,N,d), blocked (N,N) or None, {name: slice})
        "Extra queries, then the matching ones, whose content is zero"
        table = self.query_embed.weight.to(encoded.memory.dtype).expand(encoded.memory.shape[0], -1, -1)
        content, logits, blocked, slices = combine_extras(extras, self.cfg.num_queries)
        if not extras:
            return torch.zeros_like(table), table, None, slices
        boxes = at_least_float32(logits.detach()).sigmoid()
        content = content.to(table.dtype)
        pos = centre_code(boxes, encoded.cells, self.cfg.d_model).to(table.dtype)
        if alone:
            return content, pos, blocked[: content.shape[1]], slices
        return torch.cat([content, torch.zeros_like(table)], 1), torch.cat([pos, table], 1), blocked, slices

    def decode(
        self,
        encoded: EncodedMap,  # from `encode`
        extras=(),  # list of `ExtraQueries`, which stand in this order in front of the matching queries
        cached: Outputs = None,  # of `decode(encoded)`: only the extras are computed
    ) -> Outputs:
        "Queries through the decoder and the heads; every prediction has `scores`"
        if cached is not None and not extras:
            return cached
        content, pos, blocked, slices = self.queries(encoded, extras, cached is not None)
        hs, states = self.transformer.decoder(
            content,
            pos,
            encoded.memory,
            encoded.position,
            encoded.padding_mask,
            blocked,
            None if cached is None else cached['states'],
        )
        logits, boxes = self.class_embed(hs), at_least_float32(self.bbox_embed(hs)).sigmoid()
        outputs = collect_outputs(encoded, hs, logits, boxes, extras, slices, states, cached)
        new = [outputs['extra'][e.name] for e in extras]
        new += [] if cached is not None else [outputs, *outputs['aux_outputs']]
        add_scores(new)
        return outputs

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) as in `encode`
        mask: Tensor = None,  # (B,H,W) bool, True=padding
        targets: list = None,  # not used: there is no denoising
    ) -> Outputs:
        "Encode and decode"
        return self.decode(self.encode(images, mask))

    def denoise(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> list:  # empty
        "No denoising queries"
        return []

    def param_groups(self) -> dict:  # 'backbone', 'rest' -> trainable parameters
        "Parameters for the optimiser: the pretrained backbone usually gets a smaller learning rate"
        return split_parameters(self)


# %% [markdown]
# Two scenes of the built-in data. An untrained network predicts nearly the same boxes for both, since its
# queries are the same for every image:

# %%
torch.manual_seed(0)
lesson_sizes = dict(d_model=64, layers=2, enc_layers=1, ffn=128, num_queries=20, dropout=0.0)
lesson = DETRConfig(10, BackboneConfig('efficientnet_lite0', out_strides=(16,)), **lesson_sizes)
model = build_detector(lesson).eval()
scenes = [DigitsScenes('train', n=8)[i] for i in (3, 5)]
mean, std = model.backbone.mean, model.backbone.std
images = torch.stack([TF.normalize(TF.to_tensor(s.image), mean, std) for s in scenes])
with torch.no_grad():
    untrained = model(images)
assert isinstance(model, DetectionTransformer)
gap = (untrained['pred_boxes'][0] - untrained['pred_boxes'][1]).abs().mean().item()
assert (
    gap < 0.1 and untrained['pred_logits'].shape == (2, 20, 11) and untrained['scores'].shape == (2, 20, 10)
)
gap

# %% [markdown]
# Extra queries have no influence on the matching ones, and may be added later with equal results
# (@eq-contract-extras):

# %%
torch.manual_seed(0)
extra = ExtraQueries(torch.randn(2, 4, 64), torch.randn(2, 4, 4), torch.zeros(4, 4).bool(), 'extra')
with torch.no_grad():
    encoded = model.encode(images)
    alone, common = model.decode(encoded), model.decode(encoded, [extra])
    later = model.decode(encoded, [extra], alone)
unmoved = (alone['pred_logits'] - common['pred_logits']).abs().max().item()
equal = (later['extra']['extra']['hs'] - common['extra']['extra']['hs']).abs().max().item()
assert max(unmoved, equal) < 1e-4
unmoved, equal


# %% [markdown]
# ## A set, without anchors
#
# The network learns two scenes by heart. To leave matching to its own chapter, query $i$ is assigned to object
# $i$ of each scene and all others to *no object*. Nothing told the network where objects may be or how
# large: boxes come from the queries and the image alone.

# %%
def set_loss(outputs, scenes):
    "Cross-entropy of all queries, L1 of those with an object: query i belongs to object i"
    total = 0
    for logits, boxes, scene in zip(outputs['pred_logits'], outputs['pred_boxes'], scenes):
        n, labels = len(scene.labels), torch.full((len(logits),), 10)
        labels[:n] = scene.labels
        truth = normalize_boxes(scene.boxes, scene.size)
        total = total + F.cross_entropy(logits, labels) + 5 * (boxes[:n] - truth).abs().mean()
    return total


torch.manual_seed(0)
model.train()
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
history = []
for _ in range(60):
    loss = set_loss(model(images), scenes)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    history.append(loss.item())
assert history[-1] < 0.5 * history[0]
[round(v, 2) for v in history[::10]]

# %%
#| label: fig-detr-set
#| fig-cap: "Predicted boxes of a scene before and after sixty steps (blue), and the true ones (green). At the start the boxes of all queries lie near the centre; afterwards those with a score above one half lie on the objects."
#| fig-alt: "Two panels with the same scene of digits; on the left many similar boxes around the centre, on the right one box on each digit"
with torch.no_grad():
    learned = model.eval()(images)
confident = learned['scores'][0].amax(-1) > 0.5
assert confident.sum() <= len(scenes[0].labels)
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.5), dpi=80, layout='constrained')
for ax, found, name in (
    (axes[0], untrained['pred_boxes'][0], 'untrained'),
    (axes[1], learned['pred_boxes'][0, confident], 'after 60 steps'),
):
    show_image(ax, scenes[0].image, title=name)
    draw_boxes(ax, scenes[0].boxes, kind='truth')
    draw_boxes(ax, denormalize_boxes(found, scenes[0].size), kind='student', lw=1)
plt.show()


# %% [markdown]
# ## Published weights
#
# The names are those of the original state dicts, with one exception: `backbone.0.body.` is `backbone.body.`
# here. A file of the release holds the state dict under the key `model`. Its class head has 92 rows: 91 category
# ids of COCO, some of them unused, and *no object*.

# %%
#| export
def from_original(
    state: dict,  # state dict under the original names
    settings: DETRConfig,  # of the network that it belongs to
) -> dict:  # state dict for `load_state_dict`
    "Original names to ours; `ConfigError` where a name or shape does not fit"
    renamed = {}
    for key, value in state.items():
        if not key.endswith(('num_batches_tracked', 'total_ops', 'total_params')):
            renamed[key.replace('backbone.0.body.', 'backbone.body.', 1)] = value
    check_fit(renamed, settings, 'DETR')
    return renamed


def to_original(
    state: dict,  # of a `DETR`
) -> dict:  # state dict under the original names
    "Our names to those of the original, without the counters of batches that it does not save"
    kept = {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    return {k.replace('backbone.body.', 'backbone.0.body.', 1): v for k, v in kept.items()}


# %%
resnet_settings = replace(lesson, backbone=BackboneConfig('resnet18', 'none', (32,)))
source = build_detector(resnet_settings).state_dict()
original = to_original(source)
again = from_original(original, resnet_settings)
assert list(again) == list(source) and all(torch.equal(again[k], v) for k, v in source.items())
try:
    from_original({**original, 'class_embed.bias': torch.zeros(92)}, resnet_settings)
except ConfigError as error:
    misfit = str(error)
assert 'class_embed.bias is (92,), not (11,)' in misfit
misfit

# %% [markdown]
# ## Summary
#
# - DETR predicts a set: one box or *no object* per query, without anchors and without suppression.
# - Every token attends to every token, every query to every token; padding is hidden by a mask.
# - Content starts at zero, position is learned; each layer predicts boxes anew.
# - `scores` is the softmax without its last class, in every prediction.
# - Extra queries take their position from the centre of their box; names are those of the release.
#
# ## Exercises
#
# 1. Count the pairs of tokens for an image of 800x1333 at strides 32, 16 and 8. Which of them fit in memory?
# 2. The first self-attention of the decoder has no effect. Remove it, and compare the outputs.
# 3. In `set_loss` the many queries without an object dominate the cross-entropy. What does a weight of 0.1 for
#    the no-object class change in `history`?
