"""Tiny transformers of diffusers' pipelines that `tests/matrix.py` builds: configurations, and what calls are given."""

import inspect

import diffusers
import tiny
import torch

WIDE, TOKENS = 16, 5
"""The width of an embedded prompt, and how many tokens it has: not as many as the image, so that streams of tokens that
were taken for each other would not fit."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TWO = {"num_layers": 2, "num_single_layers": 2}
ROPE = {"axes_dims_rope": (2, 2, 4)}
PACKED = HEADS | TWO | ROPE | {"in_channels": 16, "joint_attention_dim": WIDE}

CONFIGS = {
    "AllegroTransformer3DModel": HEADS | {
        "attention_head_dim": 24, "num_layers": 3, "cross_attention_dim": 48,
        "caption_channels": WIDE, "sample_height": 8, "sample_width": 8, "sample_frames": 2},
    "AuraFlowTransformer2DModel": HEADS | {
        "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": WIDE,
        "caption_projection_dim": 16, "pos_embed_max_size": 64},
    "BriaTransformer2DModel": PACKED,
    "ChromaTransformer2DModel": PACKED | {"approximator_num_channels": 8, "approximator_hidden_dim": 16,
                                          "approximator_layers": 1},
    "Flux2Transformer2DModel": PACKED | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8},
    "HunyuanDiT2DModel": HEADS | {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "num_layers": 4,
        "cross_attention_dim": WIDE, "cross_attention_dim_t5": WIDE, "pooled_projection_dim": 4, "text_len": TOKENS,
        "text_len_t5": TOKENS},
    "HunyuanImageTransformer2DModel": HEADS | TWO | {
        "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": WIDE, "rope_axes_dim": (4, 4)},
    "HunyuanVideoTransformer3DModel": HEADS | TWO | {
        "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": WIDE,
        "pooled_projection_dim": 12, "rope_axes_dim": (2, 2, 4)},
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": WIDE, "in_text_dim2": 12, "time_dim": 8, "model_dim": 16, "ff_dim": 16, "num_text_blocks": 1,
        "num_visual_blocks": 3, "axes_dims": (2, 2, 4)},
    "Krea2Transformer2DModel": {
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": WIDE,
        "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
        "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (2, 2, 4)},
    "LTXVideoTransformer3DModel": HEADS | {
        "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 3, "caption_channels": WIDE},
    "Lumina2Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 3, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (2, 2, 4),
        "axes_lens": (16, 16, 16), "cap_feat_dim": WIDE},
    "LuminaNextDiT2DModel": {
        "sample_size": 8, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 8, "cross_attention_dim": WIDE},
    "NucleusMoEImageTransformer2DModel": HEADS | ROPE | {
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDE, "moe_enabled": False},
    "OvisImageTransformer2DModel": PACKED | {"out_channels": 16},
    "PRXTransformer2DModel": {"in_channels": 4, "context_in_dim": WIDE, "hidden_size": 16, "num_heads": 2, "depth": 3,
                              "axes_dim": (4, 4)},
    "QwenImageTransformer2DModel": HEADS | ROPE | {
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDE},
    "SanaTransformer2DModel": HEADS | {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDE, "sample_size": 8},
    "SanaVideoTransformer3DModel": HEADS | {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDE, "sample_size": 8},
    "SkyReelsV2Transformer3DModel": HEADS | {
        "in_channels": 4, "out_channels": 4, "text_dim": WIDE, "freq_dim": 8, "ffn_dim": 16, "num_layers": 3},
    "WanTransformer3DModel": HEADS | {
        "in_channels": 4, "out_channels": 4, "text_dim": WIDE, "freq_dim": 8, "ffn_dim": 16, "num_layers": 3}}


def embeddings(kind):
    """Embedded prompts, by the names that calls have for them."""
    draw = torch.Generator().manual_seed(0)
    layers = (2,) if kind.startswith("Krea2") else ()
    mask = torch.ones(1, TOKENS, dtype=torch.bool if kind.startswith(("Chroma", "Krea2")) else torch.long)
    given = {}
    for sign in ("", "negative_"):
        for more in ("", "_2", "_t5", "_qwen"):
            given[f"{sign}prompt_embeds{more}"] = torch.randn(1, TOKENS, *layers, WIDE, generator=draw)
            given |= {f"{sign}prompt_attention_mask{more}": mask, f"{sign}prompt_embeds_mask{more}": mask}
        given |= {f"{sign}pooled_prompt_embeds": torch.randn(1, 12, generator=draw),
                  f"{sign}prompt_embeds_clip": torch.randn(1, 12, generator=draw),
                  f"{sign}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)}
    return given


def pipeline(kind, network, wanted):
    """A tiny pipeline around a tiny transformer, with no part that it can do without, and what it is called with."""
    parts = {name: value.default for name, value in wanted.items()}
    parts = {name: None if value is inspect.Parameter.empty else value for name, value in parts.items()}
    images = "vae" in wanted and str(wanted["vae"].annotation).endswith("AutoencoderKL'>")
    betas = any(name in str(wanted["scheduler"]) for name in ("KarrasDiffusion", "DDPM"))
    flow = not betas or kind.__name__.startswith("Bria")
    parts |= {"transformer": getattr(diffusers, network)(**CONFIGS[network]),
              "scheduler": tiny.flow(shift=3.0) if flow else tiny.ddim()}
    if images:
        parts["vae"] = tiny.vae(**({"shift_factor": 0.1} if flow else {}))
    side = 16 if images else 64
    takes = inspect.signature(kind.__call__).parameters
    given = embeddings(kind.__name__) | {"height": side, "width": side, "num_frames": 5, "frames": 5, "strength": 1.0,
                       "use_resolution_binning": False, "max_sequence_length": TOKENS, "image": tiny.picture(),
                       "mask_image": tiny.picture().convert("L"), "prompt": None, "negative_prompt": None,
                       "output_type": "np" if images else "latent"}
    if not images or kind.__name__ == "Kandinsky5I2IPipeline":  # which makes any picture large
        given = {name: value for name, value in given.items() if name != "image"}
    return kind(**parts), {name: value for name, value in given.items() if name in takes}
