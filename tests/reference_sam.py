"""Tiny reference implementations of published Segment Anything models, in the parameter names of their own files.

They are written from the published architectures and know nothing of this package or of transformers, so that what
a converter makes of an original state dict can be compared with them number by number. Small sizes are the defaults.
"""

import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a (B, C, H, W) map."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SelfAttention(nn.Module):
    """Attention among the positions of a (B, H, W, C) map, with decomposed relative positions if `grid` is given."""

    def __init__(self, width, heads, grid=None):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if grid:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (B, H, W, heads, C / heads) each
        scores = torch.einsum("byxnc,bvunc->bnyxvu", q, k) / math.sqrt(q.shape[-1])
        if self.grid:  # the query is not scaled here
            i = torch.arange(self.grid)
            offsets = i[:, None] - i + self.grid - 1  # of (query, key)
            scores = scores + torch.einsum("byxnc,yvc->bnyxv", q, self.rel_pos_h[offsets])[..., :, None]
            scores = scores + torch.einsum("byxnc,xuc->bnyxu", q, self.rel_pos_w[offsets])[..., None, :]
        weights = scores.flatten(-2).softmax(-1).view_as(scores)
        return self.proj(torch.einsum("bnyxvu,bvunc->byxnc", weights, v).flatten(-2))


def mlp(width, hidden, activation, first="lin1", second="lin2"):
    layers = [(first, nn.Linear(width, hidden)), ("act", activation), (second, nn.Linear(hidden, width))]
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """Transformer block on a (B, H, W, C) map: global attention if `window` is 0, else within zero-padded windows."""

    def __init__(self, width, heads, grid=None, window=0, names=("lin1", "lin2")):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads, window or grid)
        self.mlp = mlp(width, 4 * width, nn.GELU(), *names)

    def attend(self, x):
        if not self.window:
            return self.attn(x)
        size, side = x.shape[1], self.window
        x = F.pad(x, (0, 0, 0, -size % side, 0, -size % side))
        tiles = [[self.attn(tile) for tile in row.split(side, 2)] for row in x.split(side, 1)]
        return torch.cat([torch.cat(row, 2) for row in tiles], 1)[:, :size, :size]

    def forward(self, x, adapted):
        x = x + self.attend(self.norm1(x))
        normed = self.norm2(x)
        return x + self.mlp(normed) + (self.Adapter(normed) if adapted else 0)


class ImageEncoder(nn.Module):
    def __init__(self, patch_size, positions, blocks, width, out):
        super().__init__()
        self.adapted = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, *positions, width))
        self.blocks = nn.ModuleList(blocks)
        first, second = nn.Conv2d(width, out, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(first, LayerNorm2d(out, eps=1e-6), second, LayerNorm2d(out, eps=1e-6))

    def positions(self, size):
        return self.pos_embed

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).movedim(1, -1)
        x = x + self.positions(x.shape[1])
        for block in self.blocks:
            x = block(x, self.adapted)
        return self.neck(x.movedim(-1, 1))


class PositionEmbedding(nn.Module):
    """Random Fourier features of points (..., 2), x before y, within [0, 1]."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, points):
        angles = 2 * math.pi * ((2 * points - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def grid(self, size):
        centres = (torch.arange(size).to(self.positional_encoding_gaussian_matrix) + 0.5) / size
        return self(torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)).movedim(-1, 0)[None]

    def corners(self, boxes, size):
        return self((boxes.unflatten(-1, (2, 2)) + 0.5) / size)


class PromptEncoder(nn.Module):
    def __init__(self, image_size, width, hidden):
        super().__init__()
        self.image_size = image_size
        self.pe_layer = PositionEmbedding(width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, width), nn.Embedding(1, width)
        first = nn.Conv2d(1, hidden // 4, 2, 2), LayerNorm2d(hidden // 4, eps=1e-6), nn.GELU()
        second = nn.Conv2d(hidden // 4, hidden, 2, 2), LayerNorm2d(hidden, eps=1e-6), nn.GELU()
        self.mask_downscaling = nn.Sequential(*first, *second, nn.Conv2d(hidden, width, 1))

    def forward(self, boxes):
        """The two sparse embeddings of each box, (B, 2, C), and the dense embedding without a mask, (1, C, 1, 1)."""
        kinds = torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])
        return self.pe_layer.corners(boxes, self.image_size) + kinds, self.no_mask_embed.weight[..., None, None]


class CrossAttention(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q, k, v):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        weights = (torch.einsum("bqnc,bknc->bnqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out_proj(torch.einsum("bnqk,bknc->bqnc", weights, v).flatten(-2))


class TwoWayBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.self_attn = CrossAttention(width, heads, width)
        self.cross_attn_token_to_image = CrossAttention(width, heads, width // 2)
        self.cross_attn_image_to_token = CrossAttention(width, heads, width // 2)
        self.mlp = mlp(width, hidden, nn.ReLU())
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))  # eps is 1e-5 here

    def forward(self, tokens, image, token_pe, image_pe, first):
        if first:  # neither positions nor a residual connection
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            query = tokens + token_pe
            tokens = self.norm1(tokens + self.self_attn(query, query, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens))
        return tokens, image


class Head(nn.Module):
    def __init__(self, width, hidden, out):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())


class MaskDecoder(nn.Module):
    def __init__(self, width, heads, hidden, iou_hidden):
        super().__init__()
        layers = nn.ModuleList(TwoWayBlock(width, heads, hidden) for _ in range(2))
        self.transformer = nn.ModuleDict({"layers": layers})
        self.transformer["final_attn_token_to_image"] = CrossAttention(width, heads, width // 2)
        self.transformer["norm_final_attn"] = nn.LayerNorm(width)
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(4, width)
        first = nn.ConvTranspose2d(width, width // 4, 2, 2), LayerNorm2d(width // 4, eps=1e-6), nn.GELU()
        self.output_upscaling = nn.Sequential(*first, nn.ConvTranspose2d(width // 4, width // 8, 2, 2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(Head(width, width, width // 8) for _ in range(4))
        self.iou_prediction_head = Head(width, iou_hidden, 4)

    def forward(self, image, image_pe, sparse, dense):
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = token_pe = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], 1)
        keys, image_pe = (image + dense).flatten(2).mT, image_pe.flatten(2).mT
        for i, layer in enumerate(self.transformer["layers"]):
            tokens, keys = layer(tokens, keys, token_pe, image_pe, first=i == 0)
        update = self.transformer["final_attn_token_to_image"](tokens + token_pe, keys + image_pe, keys)
        tokens = self.transformer["norm_final_attn"](tokens + update)
        upscaled = self.output_upscaling(keys.mT.unflatten(-1, image.shape[2:]))
        filters = torch.stack([head(tokens[:, 1 + i]) for i, head in enumerate(self.output_hypernetworks_mlps)], 1)
        return torch.einsum("bmc,bcyx->bmyx", filters, upscaled), self.iou_prediction_head(tokens[:, 0])


class ReferenceSam(nn.Module):
    """SAM, as in `sam_vit_b_01ec64.pth` with the sizes 1024, 16, 768, 12, 12, 14, (2, 5, 8, 11), 256, 8, 2048, 256
    and 16. The mean and the deviation of the pixels are buffers that are not in the file."""

    def __init__(
        self,
        image_size=64,
        patch_size=16,
        width=32,
        depth=4,
        heads=2,
        window=3,
        global_blocks=(1, 3),
        decoder_width=32,
        decoder_heads=2,
        decoder_hidden=64,
        iou_hidden=48,
        mask_hidden=16,
    ):
        super().__init__()
        grid = image_size // patch_size
        blocks = (Block(width, heads, grid, 0 if i in global_blocks else window) for i in range(depth))
        self.image_encoder = ImageEncoder(patch_size, (grid, grid), blocks, width, decoder_width)
        self.prompt_encoder = PromptEncoder(image_size, decoder_width, mask_hidden)
        self.mask_decoder = MaskDecoder(decoder_width, decoder_heads, decoder_hidden, iou_hidden)
        self.register_buffer("pixel_mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, pixels, boxes):
        """Image embeddings (B, C, s, s), low-resolution masks (B, 1 + 3, 4s, 4s) and their scores (B, 1 + 3) of
        normalised pixels (B, 3, S, S) and one box each (B, 4), in pixels x0 y0 x1 y1."""
        image = self.image_encoder(pixels)
        image_pe = self.prompt_encoder.pe_layer.grid(image.shape[-1])
        return image, *self.mask_decoder(image, image_pe, *self.prompt_encoder(boxes))


class Adapter(nn.Module):
    """SAM-Med2D's adapter: a gate of the channels, then a convolution down and up again (which an even grid needs)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # eps is 1e-5 here
        down, up = nn.Linear(width, width // 4, bias=False), nn.Linear(width // 4, width, bias=False)
        self.channel = nn.Sequential(down, nn.ReLU(), up, nn.Sigmoid())
        down = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)
        self.spatial = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())

    def forward(self, x):
        gated = x * self.channel(x.mean((1, 2)))[:, None, None]
        return self.norm(x + self.spatial(gated.movedim(-1, 1)).movedim(1, -1))


class ReferenceSamMed2d(ReferenceSam):
    """SAM-Med2D, as in `sam-med2d_b.pth` under "model" (SAM's sizes, but images of 256): an adapter beside the MLP of
    each block of the image encoder, which leaves them out while its attribute `adapted` is false."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.image_encoder.adapted = True
        for block in self.image_encoder.blocks:
            block.Adapter = Adapter(len(block.norm2.weight))


class EfficientImageEncoder(ImageEncoder):
    def positions(self, size):
        grid = self.pos_embed[:, 1:].mT  # without the class token's
        grid = grid.unflatten(-1, (math.isqrt(grid.shape[-1]), -1))
        if grid.shape[-1] != size:
            grid = F.interpolate(grid, (size, size), mode="bicubic", align_corners=False)
        return grid.movedim(1, -1)


class ReferenceEfficientSam(nn.Module):
    """EfficientSAM's encoders, as in `efficient_sam_vitt.pt` under "model" with the sizes 1024, 16, 192, 12, 3, 14 and
    256. Its mask decoder is not SAM's: only some of its parameters are here, and compute nothing."""

    def __init__(self, image_size=64, patch_size=16, width=32, depth=4, heads=2, pretrained_grid=3, decoder_width=32):
        super().__init__()
        self.image_size, positions, out = image_size, pretrained_grid**2 + 1, decoder_width
        blocks = (Block(width, heads, names=("fc1", "fc2")) for _ in range(depth))
        self.image_encoder = EfficientImageEncoder(patch_size, (positions,), blocks, width, out)
        kinds = "invalid_points", "point_embeddings", "bbox_top_left_embeddings", "bbox_bottom_right_embeddings"
        self.prompt_encoder = nn.ModuleDict({name: nn.Embedding(1, out) for name in kinds})
        self.prompt_encoder["pe_layer"] = PositionEmbedding(out)
        layer = nn.ModuleDict({"self_attn": CrossAttention(out, 1, out), "norm1": nn.LayerNorm(out)})
        decoder = nn.ModuleDict({"transformer": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
        decoder.update({"iou_token": nn.Embedding(1, out), "mask_tokens": nn.Embedding(4, out)})
        upscaling = nn.Sequential(nn.ConvTranspose2d(out, out // 4, 2, 2), nn.GroupNorm(1, out // 4))
        decoder["final_output_upscaling_layers"] = nn.ModuleList([upscaling])
        layers = nn.ModuleList(nn.Sequential(nn.Linear(out, out), nn.GELU()) for _ in range(2))
        decoder["iou_prediction_head"] = nn.ModuleDict({"layers": layers, "fc": nn.Linear(out, 4)})
        self.mask_decoder = decoder
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def embed_images(self, pixels):
        """Image embeddings (B, C, s, s) of normalised pixels (B, 3, S, S)."""
        return self.image_encoder(pixels)

    def embed_boxes(self, boxes):
        """The two sparse embeddings (B, 2, C) of one box each (B, 4). EfficientSAM itself adds four invalid points."""
        kinds = [self.prompt_encoder[f"bbox_{name}_embeddings"].weight for name in ("top_left", "bottom_right")]
        return self.prompt_encoder["pe_layer"].corners(boxes, self.image_size) + torch.cat(kinds)


@torch.no_grad()
def randomise(module, seed):
    """Fill every parameter, and the matrix of the positional encoding, with values that keep outputs moderate."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        for name, values in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if name.startswith("pixel_"):
                continue
            offset, scale = 0.0, 0.5  # of tokens, positions and the like
            if isinstance(child, (nn.LayerNorm, nn.GroupNorm)) and name == "weight":
                offset, scale = 1.0, 0.2
            elif name == "bias":
                scale = 0.2
            elif isinstance(child, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                scale = (len(values) if isinstance(child, nn.ConvTranspose2d) else values[0].numel()) ** -0.5
            values.copy_(offset + scale * torch.randn(values.shape, generator=generator))
    return module
