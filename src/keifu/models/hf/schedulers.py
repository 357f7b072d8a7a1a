"""The noise schedule and prediction target in diffusers' scheduler_config.json.

A scheduler's file names a sampler too, and the sampler's own options; those are not read, since the sampler is not part
of the model.
"""

from typing import Any

from keifu.errors import unknown
from keifu.layers.diffusion.noise_schedule import Noise

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
TARGETS = {"epsilon": "noise", "sample": "picture", "v_prediction": "velocity"}
VARIANCES = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}
VARIANCES |= {"fixed_small_log": "fixed_small"}  # computed through its logarithm
UNCLIP = "UnCLIPScheduler"
SILENT = {UNCLIP: "squaredcos_cap_v2"}  # the default schedule of a class
# class -> its defaults of clip_sample, timestep_spacing, set_alpha_to_one
CLASSES = {
    "DDPMScheduler": (True, "leading", True),
    "DDIMScheduler": (True, "leading", True),
    "PNDMScheduler": (False, "leading", False),
    "DPMSolverMultistepScheduler": (False, "linspace", True),
    "DPMSolverSinglestepScheduler": (False, "linspace", True),
    "UniPCMultistepScheduler": (False, "linspace", True),
    "DEISMultistepScheduler": (False, "linspace", True),
    "EulerDiscreteScheduler": (False, "linspace", True),
    "EulerAncestralDiscreteScheduler": (False, "linspace", True),
    "HeunDiscreteScheduler": (False, "linspace", True),
    "LMSDiscreteScheduler": (False, "linspace", True),
    UNCLIP: (True, "linspace", True),
}


def read_scheduler(json: dict[str, Any]) -> Noise:
    """The noise that a scheduler_config.json describes; a value that is not implemented is a ValueError."""
    kind = json.get("_class_name", "DDPMScheduler")
    if kind not in CLASSES:
        raise unknown("scheduler", kind, CLASSES)
    clips, spacing, last_alpha_one = CLASSES[kind]
    clips = json.get("clip_sample", clips)
    return Noise(
        schedule=_named("beta_schedule", json.get("beta_schedule", SILENT.get(kind, "linear")), SCHEDULES),
        steps=json.get("num_train_timesteps", 1000),
        beta_start=float(json.get("beta_start", 1e-4)),
        beta_end=float(json.get("beta_end", 0.02)),
        betas=tuple(json.get("trained_betas") or ()),
        zero_terminal_snr=bool(json.get("rescale_betas_zero_snr", False)),
        target=_named("prediction_type", json.get("prediction_type", "epsilon"), TARGETS),
        variance=_named("variance_type", json.get("variance_type") or "fixed_small", VARIANCES),
        clip=float(json.get("clip_sample_range", 1.0)) if clips else None,
        threshold=float(json.get("dynamic_thresholding_ratio", 0.995)) if json.get("thresholding") else None,
        threshold_max=float(json.get("sample_max_value", 1.0)),
        spacing=json.get("timestep_spacing", spacing),
        steps_offset=json.get("steps_offset", 0),
        last_alpha_one=bool(json.get("set_alpha_to_one", last_alpha_one)),
    )


def _named(field: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise unknown(field, str(value), known)
    return known[value]


def write_scheduler(noise: Noise) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' DDPMScheduler, or of its DDIMScheduler, which alone of the two can end at
    the noise of timestep 0."""
    ours = {"DDPMScheduler": {"variance_type": noise.variance}, "DDIMScheduler": {"set_alpha_to_one": False}}
    kind = "DDPMScheduler" if noise.last_alpha_one else "DDIMScheduler"
    return ours[kind] | {
        "_class_name": kind,
        "num_train_timesteps": noise.steps,
        "beta_schedule": next(theirs for theirs, name in SCHEDULES.items() if name == noise.schedule),
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "trained_betas": [*noise.betas] or None,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
        "prediction_type": next(theirs for theirs, name in TARGETS.items() if name == noise.target),
        "clip_sample": noise.clip is not None,
        "clip_sample_range": 1.0 if noise.clip is None else noise.clip,
        "thresholding": noise.threshold is not None,
        "dynamic_thresholding_ratio": 0.995 if noise.threshold is None else noise.threshold,
        "sample_max_value": noise.threshold_max,
        "timestep_spacing": noise.spacing,
        "steps_offset": noise.steps_offset,
    }


def write_unclip_scheduler(noise: Noise) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' UnCLIPScheduler, which has the cosine schedule, two targets and evenly
    spaced timesteps alone: what it has no fields for is left out, and differs when it is read back."""
    return {
        "_class_name": UNCLIP,
        "num_train_timesteps": noise.steps,
        "beta_schedule": SILENT[UNCLIP],
        "prediction_type": "sample" if noise.target == "picture" else "epsilon",
        "variance_type": "learned_range" if noise.variance == "learned_range" else "fixed_small_log",
        "clip_sample": noise.clip is not None,
        "clip_sample_range": 1.0 if noise.clip is None else noise.clip,
    }
