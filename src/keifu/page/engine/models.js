// A model from the files of its folder: which landmark it is, its numbers, and its tokenizer.

import { ModelError, Tensors } from "./tensors.js";
import { Tokenizer } from "./tokenizers.js";

const KINDS = { // by the model_type of config.json; a landmark's module is loaded when a model needs it
  keifu_perceptron: async (tensors) => (await import("./perceptron.js")).Perceptron.load(tensors),
  keifu_mlp: async (tensors, config) => new (await import("./mlp.js")).MLP(tensors, config),
  marian: async (tensors, config) => new (await import("./transformer.js")).Transformer(tensors, config),
  bert: async (tensors, config) => new (await import("./bert.js")).BERT(tensors, config),
  llama: async (tensors, config) => new (await import("./llama.js")).Llama(tensors, config),
  clip: async (tensors, config) => new (await import("./clip.js")).CLIP(tensors, config),
  llava: async (tensors, config) => new (await import("./llava.js")).Llava(tensors, config),
};

function parsed(files, name) {
  if (!(name in files)) throw new ModelError(`The model's folder lacks ${name}.`);
  try {
    return JSON.parse(new TextDecoder().decode(files[name]));
  } catch {
    throw new ModelError(`${name} is damaged: it is no JSON. Load it again.`);
  }
}

const optional = (files, name) => (name in files ? parsed(files, name) : null);
const weights = (files, name) => files[name] ?? missing(name);
const missing = (name) => { throw new ModelError(`The model's folder lacks ${name}.`); };

// files: { "config.json": ArrayBuffer, ... } with the names inside the folder. kernel: a WebAssembly.Module, or null.
// Returns { kind, model, tokenizer, tensors, config, generation, pixels }.
export async function readModel(files, kernel = null) {
  if ("model_index.json" in files) return readPipeline(files, kernel);
  const config = parsed(files, "config.json");
  const kind = config.model_type;
  if (!Object.hasOwn(KINDS, kind)) {
    throw new ModelError(`The engine does not know models of the type ${kind}; it knows ${Object.keys(KINDS).join(", ")}.`);
  }
  const tensors = new Tensors(weights(files, "model.safetensors"), kernel);
  const json = optional(files, "tokenizer.json");
  return {
    kind, config, tensors,
    model: await KINDS[kind](tensors, config),
    tokenizer: json && new Tokenizer(json),
    generation: optional(files, "generation_config.json") ?? {},
    pixels: optional(files, "preprocessor_config.json"),
  };
}

// The folders of a diffusers pipeline: a DDPM, or latent diffusion.
async function readPipeline(files, kernel) {
  const name = parsed(files, "model_index.json")._class_name;
  const unet = parsed(files, "unet/config.json");
  const scheduler = parsed(files, "scheduler/scheduler_config.json");
  if (name === "DDPMPipeline") {
    const tensors = new Tensors(weights(files, "unet/diffusion_pytorch_model.safetensors"), kernel);
    const { DDPM } = await import("./ddpm.js");
    return { kind: "ddpm", config: unet, tensors, model: new DDPM(tensors, unet, scheduler), tokenizer: null };
  }
  if (name !== "StableDiffusionPipeline") throw new ModelError(`The engine does not know pipelines of the type ${name}.`);
  const parts = { text_encoder: "model", unet: "diffusion_pytorch_model", vae: "diffusion_pytorch_model" };
  const named = Object.entries(parts).map(([part, file]) => [weights(files, `${part}/${file}.safetensors`), `${part}.`]);
  const tensors = new Tensors(named, kernel);
  const [text, vae] = ["text_encoder", "vae"].map((part) => parsed(files, `${part}/config.json`));
  const { LatentDiffusion } = await import("./latent_diffusion.js");
  const model = new LatentDiffusion(tensors, { text_encoder: text, unet, vae, scheduler });
  return { kind: "latent_diffusion", config: unet, tensors, model, tokenizer: new Tokenizer(parsed(files, "tokenizer/tokenizer.json")) };
}
