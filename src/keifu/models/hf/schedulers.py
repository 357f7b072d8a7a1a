"""The noise schedule and prediction target in diffusers' scheduler_config.json.

A scheduler's file also names a sampler and its options. These are not read, since the sampler is not part of the model.
"""

from typing import Any

from keifu.errors import UserError, require_known
from keifu.layers.diffusion.noise_schedule import DynamicShift, Noise
from keifu.models.hf.config import Field, Fields, choice, read_field, read_fields, write_fields

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
VARIANCE = choice("variance_type", {
    **{name: name for name in ("fixed_small", "fixed_large", "learned_range")},
    # fixed_small_log is the same, computed through its logarithm
    "fixed_small_log": "fixed_small", None: "fixed_small",
})  # fmt: skip
FIELDS: Fields = {
    "schedule": choice("beta_schedule", _SCHEDULES),
    "steps": Field("num_train_timesteps", 1000),
    "beta_start": Field("beta_start", 1e-4, float),
    "beta_end": Field("beta_end", 0.02, float),
    "betas": Field("trained_betas", (), lambda betas: tuple(betas or ()), lambda betas: [*betas] or None),
    "zero_terminal_snr": Field("rescale_betas_zero_snr", False, bool),
    "target": choice("prediction_type", {"epsilon": "noise", "sample": "picture", "v_prediction": "velocity"}),
    "threshold_max": Field("sample_max_value", 1.0, float),
    "spacing": Field("timestep_spacing"),
    "steps_offset": Field("steps_offset", 0),
}
UNCLIP = "UnCLIPScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_FIELDS: Fields = {
    "steps": Field("num_train_timesteps", 1000),
    "shift": Field("shift", 1.0, float),
    "clip": Field("_clip_sample_range", None),  # keifu's: diffusers ignores names with an underscore
}
DYNAMIC_FIELDS: Fields = {
    "base_shift": Field("base_shift", 0.5, float),
    "max_shift": Field("max_shift", 1.15, float),
    "base_length": Field("base_image_seq_len", 256),
    "max_length": Field("max_image_seq_len", 4096),
    "exponential": choice("time_shift_type", {"exponential": True, "linear": False}),
}
_OFF = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas")
FLOW_UNSUPPORTED = dict.fromkeys((*_OFF, "use_beta_sigmas"), False) | {"shift_terminal": None}
SILENT = {UNCLIP: "squaredcos_cap_v2"}  # the default schedule of a class
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete",
           "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")  # fmt: skip
# class → its defaults of clip_sample, timestep_spacing, set_alpha_to_one
CLASSES = {
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler"), (True, "leading", True)),
    "PNDMScheduler": (False, "leading", False),
    UNCLIP: (True, "linspace", True),
    FLOW: (False, "leading", True),
    **{f"{name}Scheduler": (False, "linspace", True) for name in SOLVERS},
}


def read_scheduler(json: dict[str, Any]) -> Noise:
    """Return the noise that a scheduler_config.json describes. Raises UserError for a value that is not implemented."""
    class_name = json.get("_class_name", "DDPMScheduler")
    require_known("scheduler", class_name, CLASSES)
    if class_name == FLOW:
        if wrong := [name for name, only in FLOW_UNSUPPORTED.items() if (json.get(name) or only) != only]:
            raise UserError(f"its {wrong[0]} is {json[wrong[0]]!r}, which is not implemented for a flow.")
        dynamic = DynamicShift(**read_fields(json, DYNAMIC_FIELDS)) if json.get("use_dynamic_shifting") else None
        return Noise("flow", target="flow", dynamic=dynamic, **read_fields(json, FLOW_FIELDS))
    clips, spacing, last_alpha_one = CLASSES[class_name]
    silent = {"beta_schedule": SILENT.get(class_name, "linear"), "timestep_spacing": spacing}
    json = silent | {"set_alpha_to_one": last_alpha_one, "clip_sample": clips} | json
    return Noise(
        **read_fields(json, FIELDS),
        variance=read_field(json, VARIANCE),
        clip=float(json.get("clip_sample_range", 1.0)) if json["clip_sample"] else None,
        threshold=float(json.get("dynamic_thresholding_ratio", 0.995)) if json.get("thresholding") else None,
        last_alpha_one=bool(json["set_alpha_to_one"]),
    )


def write_scheduler(noise: Noise) -> dict[str, Any]:
    """Return the scheduler_config.json of diffusers' DDPMScheduler; of its DDIMScheduler, if the last step ends at the
    noise of timestep 0; or of its scheduler for flows."""
    if noise.flows:
        dynamic_fields = (
            {"use_dynamic_shifting": True, **write_fields(noise.dynamic, DYNAMIC_FIELDS)} if noise.dynamic else {}
        )
        return {"_class_name": FLOW, **write_fields(noise, FLOW_FIELDS), **dynamic_fields}
    ours = {"DDPMScheduler": {"variance_type": noise.variance}, "DDIMScheduler": {"set_alpha_to_one": False}}
    class_name = "DDPMScheduler" if noise.last_alpha_one else "DDIMScheduler"
    return ours[class_name] | {
        "_class_name": class_name,
        **write_fields(noise, FIELDS),
        "clip_sample": noise.clip is not None,
        "clip_sample_range": 1.0 if noise.clip is None else noise.clip,
        "thresholding": noise.threshold is not None,
        "dynamic_thresholding_ratio": 0.995 if noise.threshold is None else noise.threshold,
    }


def write_unclip_scheduler(noise: Noise) -> dict[str, Any]:
    """Return the scheduler_config.json of diffusers' UnCLIPScheduler. It has only the cosine schedule, two targets and
    evenly spaced timesteps: other properties are lost when it is read back."""
    return {
        "_class_name": UNCLIP,
        "num_train_timesteps": noise.steps,
        "beta_schedule": SILENT[UNCLIP],
        "prediction_type": "sample" if noise.target == "picture" else "epsilon",
        "variance_type": "learned_range" if noise.variance == "learned_range" else "fixed_small_log",
        "clip_sample": noise.clip is not None,
        "clip_sample_range": 1.0 if noise.clip is None else noise.clip,
    }
