"""Stock pipelines of every kind that plans are put on, tiny and with random weights."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMTextToImagePipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

STEPS = 10
NOISE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def ddim():
    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")


def unet(kind, levels=2, **more):
    return kind(**{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                   "block_out_channels": (8, 16, 16)[:levels], "norm_num_groups": 4} | more)


def plain_unet(**more):
    return unet(UNet2DModel, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **more)


def text_unet(levels=2, **more):
    rest = ("DownBlock2D",) * (levels - 1), ("UpBlock2D",) * (levels - 1)
    return unet(UNet2DConditionModel, levels, **{
        "cross_attention_dim": 16, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", *rest[0]),
        "up_block_types": (*rest[1], "CrossAttnUpBlock2D")} | more)


def vae(**more):
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, **more)


def codes():
    return VQModel(block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                   up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, num_vq_embeddings=8)


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ddpm():
    scheduler = DDPMScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
    return DDPMPipeline(plain_unet(), scheduler), {"output_type": "np"}


def ddim_pixels():
    return DDIMPipeline(plain_unet(), ddim()), {"output_type": "np"}


def dit():
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                        num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer, vae(), ddim()), {"class_labels": [3], "output_type": "np"}


def pixart():
    transformer = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                           num_layers=3, sample_size=8, patch_size=2, caption_channels=12,
                                           cross_attention_dim=16)
    pipe = PixArtAlphaPipeline(None, None, vae(), transformer, ddim())
    texts = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 5, dtype=torch.long)
    return pipe, {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "prompt_attention_mask": mask,
                  "negative_prompt_attention_mask": mask, "negative_prompt": None, "output_type": "np", "height": 16,
                  "width": 16, "use_resolution_binning": False, "guidance_scale": 3.0}


def text_parts(**more):
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "digit</w>", "a", "d", "i", "g", "t"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokens = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16,
                                        num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=8,
                                        bos_token_id=0, eos_token_id=1, pad_token_id=1))
    return {"vae": vae(), "text_encoder": text, "tokenizer": tokens, "unet": text_unet(), "scheduler": ddim(),
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} | more


def clip(folder):
    """Save a CLIP model that reads `text_parts`' words."""
    parts = text_parts()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=parts["text_encoder"].config.to_dict(), vision_config=vision,
                         projection_dim=12)).save_pretrained(folder)
    parts["tokenizer"].save_pretrained(folder)


PROMPT = {"prompt": "a digit", "output_type": "np"}


def stable_diffusion():
    return StableDiffusionPipeline(**text_parts()), PROMPT


def image_to_image():
    return StableDiffusionImg2ImgPipeline(**text_parts()), PROMPT | {"image": picture(), "strength": 1.0}


def inpaint():
    mask = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 1).repeat(16, 0))
    return StableDiffusionInpaintPipeline(**text_parts()), PROMPT | {
        "image": picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 1.0}


def inpaint_nine_channels():
    pipe, options = inpaint()
    return type(pipe)(**text_parts(unet=text_unet(in_channels=9))), options


def controlled():
    parts = text_parts()
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return StableDiffusionControlNetPipeline(**parts, controlnet=control), PROMPT | {"image": picture()}


def instructed():
    """Three passes in one batch."""
    parts = text_parts(unet=text_unet(in_channels=8))
    return StableDiffusionInstructPix2PixPipeline(**parts), PROMPT | {
        "image": picture(), "guidance_scale": 4.0, "image_guidance_scale": 1.5}


def upscaled():
    parts = text_parts(unet=text_unet(in_channels=7, num_class_embeds=1000))
    kept = {name: part for name, part in parts.items() if name not in ("safety_checker", "requires_safety_checker",
                                                                      "feature_extractor")}
    low = DDPMScheduler(**NOISE)
    return StableDiffusionUpscalePipeline(**kept, low_res_scheduler=low, max_noise_level=350), PROMPT | {
        "image": picture(), "noise_level": 20}


def stable_diffusion_xl():
    network = text_unet(addition_embed_type="text_time", addition_time_embed_dim=4,
                        projection_class_embeddings_input_dim=4 * 6 + 12)
    pipe = StableDiffusionXLPipeline(vae(), None, None, None, None, network, ddim(), add_watermarker=False)
    draw = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(2, 1, 5, 16, generator=draw), torch.randn(2, 1, 12, generator=draw)
    return pipe, {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "pooled_prompt_embeds": pooled[0],
                  "negative_pooled_prompt_embeds": pooled[1], "output_type": "np", "height": 16, "width": 16}


def double_text():
    """SDXL with both of its text encoders."""
    words = text_parts()["tokenizer"]
    config = CLIPTextConfig(vocab_size=len(words), hidden_size=8, intermediate_size=8, num_attention_heads=2,
                            num_hidden_layers=2, max_position_embeddings=8, projection_dim=12, bos_token_id=0,
                            eos_token_id=1, pad_token_id=1)
    network = stable_diffusion_xl()[0].unet
    return StableDiffusionXLPipeline(vae(), CLIPTextModel(config), CLIPTextModelWithProjection(config), words, words,
                                     network, ddim(), add_watermarker=False), PROMPT | {"height": 16, "width": 16}


def three_levels():
    return StableDiffusionPipeline(**text_parts(unet=text_unet(3))), PROMPT


def three_levels_xl():
    pipe, options = stable_diffusion_xl()
    pipe.register_modules(unet=text_unet(
        3, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36))
    return pipe, options


def latent_text():
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "digit"]))
        tokens = BertTokenizer(str(Path(name) / "vocab.txt"))
    text = LDMBertModel(LDMBertConfig(vocab_size=7, d_model=16, encoder_layers=1, encoder_ffn_dim=16,
                                      encoder_attention_heads=2, head_dim=8, max_position_embeddings=77))
    pipe = LDMTextToImagePipeline(vqvae=codes(), bert=text, tokenizer=tokens, unet=text_unet(), scheduler=ddim())
    return pipe, {"prompt": "a digit", "output_type": "np", "guidance_scale": 3.0}


def flow(**more):
    return FlowMatchEulerDiscreteScheduler(**more)


def stable_diffusion_3():
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
                                        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
                                        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=16)
    pipe = StableDiffusion3Pipeline(transformer, flow(shift=3.0), vae(shift_factor=0.1), *(None,) * 6)
    draw = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(2, 1, 5, 16, generator=draw), torch.randn(2, 1, 12, generator=draw)
    return pipe, {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "pooled_prompt_embeds": pooled[0],
                  "negative_pooled_prompt_embeds": pooled[1], "output_type": "np", "height": 16, "width": 16}


def flux_transformer(channels=16):
    return FluxTransformer2DModel(patch_size=1, in_channels=channels, out_channels=16, num_layers=2,
                                  num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                  joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8))


def flux():
    pipe = FluxPipeline(flow(use_dynamic_shifting=True), vae(shift_factor=0.1), *(None,) * 4, flux_transformer())
    draw = torch.Generator().manual_seed(0)
    return pipe, {"prompt_embeds": torch.randn(1, 5, 16, generator=draw), "output_type": "np",
                  "pooled_prompt_embeds": torch.randn(1, 12, generator=draw), "height": 16, "width": 16}


FLOWS = (stable_diffusion_3, flux)

ALL = (ddpm, ddim_pixels, dit, pixart, stable_diffusion, image_to_image, inpaint, inpaint_nine_channels, controlled,
       instructed, upscaled, stable_diffusion_xl, latent_text)


def network(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def made(kind, seed=0):
    """A pipeline whose every weight matters, and what it is called with: (pipe, options)."""
    torch.manual_seed(seed)
    pipe, options = kind()
    parts = [network(pipe)] + ([pipe.controlnet] if hasattr(pipe, "controlnet") else [])
    for weight in (weight for part in parts for weight in part.parameters()):  # zeros would hide every difference
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


def call(pipe, options, **more):
    """Call a pipeline as its user would: the images (or frames, or latents)."""
    return pipe(**{"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(1)} | options | more)[0]
