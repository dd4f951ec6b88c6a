"""Wan 2.2, text to video, with sparse self-attention.

pip install 'rainfusion[diffusers]' transformers accelerate ftfy imageio imageio-ffmpeg
python examples/wan_text_to_video.py
python examples/wan_text_to_video.py --tiny    # no download: a tiny model with random weights
"""

import argparse

import tiny
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_gif, export_to_video

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion

CHECKPOINT = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def public():
    """The public checkpoint, with 75,600 tokens of video: 21 frames of 45x80."""
    vae = AutoencoderKLWan.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(CHECKPOINT, vae=vae, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    config = RainFusionConfig(sparsity=0.8, dense_steps=(10, 0))  # the first 10 of 40 steps settle what is where
    return pipe, config, {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 40}


def main() -> None:
    """Make a video, and say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a paper boat drifts down a rain-soaked street, close to the water")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, without a download")
    args = parser.parse_args()

    pipe, config, sizes = tiny.wan_text_to_video() if args.tiny else public()
    handle = apply_rainfusion(pipe, config)  # both experts of Wan 2.2
    frames = pipe(args.prompt, guidance_scale=4.0, output_type="pil", **sizes).frames[0]

    report = handle.report()
    print(report)
    report.heatmap("wan_text_to_video_density.png")
    if args.tiny:
        export_to_gif(frames, "wan_text_to_video.gif")
    else:
        export_to_video(frames, "wan_text_to_video.mp4", fps=16)


if __name__ == "__main__":
    main()
