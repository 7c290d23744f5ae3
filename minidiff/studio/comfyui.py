"""ComfyUI's `prompt` text: the graph of nodes that made a picture, as JSON; walked backwards from its sampler.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, "model": ["4", 0], "positive": ["6", 0], …}}, …}

An input is a value, or a link [node, output] to another node. A walk visits a node once, so a graph in a circle ends it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidiff.core.errors import DataError
from minidiff.core.grids import SAMPLERS
from minidiff.studio.foreign import GIVE_MODEL, Reading, clean, listing, needs_picture, shown, take

OURS = {  # ComfyUI's name -> ours
    "ddpm": "ddpm",
    "ddim": "ddim",
    "ipndm": "pndm",
    "euler": "euler",
    "euler_ancestral": "euler_a",
    "heun": "heun",
    "dpmpp_2m": "dpm++_2m",
    "dpmpp_2m_sde": "dpm++_2m_sde",
    "dpmpp_2m_sde_gpu": "dpm++_2m_sde",
    "uni_pc": "unipc",
    "lcm": "lcm",
}
KSAMPLERS = ("KSampler", "KSamplerAdvanced")
LOADERS = ("CheckpointLoaderSimple", "CheckpointLoader", "unCLIPCheckpointLoader")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
TEXT_INPUTS = ("text", "string", "value", "prompt", "Text", "populated_text")
ON_THE_WAY = {  # kind of link -> the inputs through which it goes on upstream
    "model": ("model",),
    "clip": ("clip",),
    "positive": ("conditioning", "conditioning_1", "conditioning_to", "positive"),
    "negative": ("conditioning", "conditioning_1", "conditioning_to", "negative"),
    "latent": ("latent_image", "samples", "latent", "pixels"),
}
MAX_NODES = 2000  # people's graphs have hundreds
NO_SETTINGS = {"VAEDecode", "VAEEncode", "VAELoader", "SaveImage", "PreviewImage", "Note", "Reroute", "PrimitiveNode"}


@dataclass
class Graph:
    """The nodes by name, and which of them have been read."""

    nodes: dict[str, Any]
    seen: set[str] = field(default_factory=set)

    def kind(self, name: str) -> str:
        return str(self.nodes[name].get("class_type", ""))

    def inputs(self, name: str) -> dict[str, Any]:
        inputs = self.nodes[name].get("inputs")
        return inputs if isinstance(inputs, dict) else {}

    def linked(self, value: object) -> str | None:
        """The node that a link leads to; None for a plain value, or for a node that is not there."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)):
            return str(value[0]) if str(value[0]) in self.nodes else None
        return None

    def upstream(self, value: object, way: str) -> Iterator[str]:
        """The nodes that a link comes from, the nearest first, through the inputs of its kind; each once."""
        visited: set[str] = set()
        while (name := self.linked(value)) is not None and name not in visited:
            visited.add(name)
            yield name
            inputs = self.inputs(name)
            value = next((inputs[key] for key in ON_THE_WAY[way] if self.linked(inputs.get(key))), None)

    def value(self, value: object, *keys: str) -> object:
        """A plain value, be it in a node of its own as people do with seeds; else None."""
        visited: set[str] = set()
        while (name := self.linked(value)) is not None and name not in visited:
            visited.add(name)
            self.seen.add(name)
            inputs = self.inputs(name)
            value = next((inputs[key] for key in (*keys, "value") if key in inputs), None)
        return None if isinstance(value, (list, dict)) else value


def read_comfyui(content: object, path: Path | str) -> Reading:
    """The settings of the first sampler of a graph, as parsed from JSON. DataError if it is no such graph, or has none."""
    if not isinstance(content, dict) or not content or not all(isinstance(node, dict) for node in content.values()):
        raise DataError(f'{path}: its text "prompt" is no graph of ComfyUI nodes.')
    if len(content) > MAX_NODES:
        raise DataError(f"{path}: its ComfyUI graph has {len(content):,} nodes; minidiff reads {MAX_NODES:,}.")
    graph = Graph(content)
    samplers = [name for name in graph.nodes if graph.kind(name) in KSAMPLERS]
    if not samplers:
        raise DataError(f"{path}: its ComfyUI graph has no KSampler; it has {listing(map(graph.kind, graph.nodes))}.")
    chosen = next((name for name in samplers if not _after_a_sampler(graph, name)), samplers[0])
    graph.seen.add(chosen)
    settings: dict[str, object] = {}
    left: list[str] = []
    notes: list[str] = []
    _sampler(graph, chosen, settings, left)
    _size(graph, chosen, settings, left, notes)
    for side, setting in (("positive", "prompt"), ("negative", "negative_prompt")):
        settings[setting] = _text(graph, chosen, side, settings, left, notes)
    _models(graph, chosen, notes)
    if len(samplers) > 1:
        notes.append(f"its graph has {len(samplers)} samplers; the first pass is read")
    rest = [graph.kind(name) for name in graph.nodes if name not in graph.seen and graph.kind(name) not in NO_SETTINGS]
    if left or rest:
        notes.append(f"not taken over, because minidiff has no counterpart: {listing([*left, *rest])}")
    return Reading("ComfyUI", settings, tuple(notes))


def _after_a_sampler(graph: Graph, name: str) -> bool:
    """Does it refine what another one drew?"""
    return any(graph.kind(other) in KSAMPLERS for other in graph.upstream(graph.inputs(name).get("latent_image"), "latent"))


def _sampler(graph: Graph, name: str, settings: dict[str, object], left: list[str]) -> None:
    inputs = graph.inputs(name)
    seed = "noise_seed" if graph.kind(name) == "KSamplerAdvanced" else "seed"
    for key, setting in (("steps", "num_inference_steps"), ("cfg", "guidance_scale"), (seed, "seed")):
        take(settings, left, setting, graph.value(inputs.get(key), key, "seed"), key)
    theirs, schedule = (str(graph.value(inputs.get(key), key)) for key in ("sampler_name", "scheduler"))
    karras = False
    if ours := OURS.get(theirs):
        settings["sampler"] = ours
        karras = SAMPLERS[ours].karras
    else:
        left.append(f"sampler_name: {shown(theirs)}")
    if karras:
        settings["use_karras_sigmas"] = schedule == "karras"
    if schedule not in ("normal", "karras" if karras else "ddim_uniform"):
        left.append(f"scheduler: {shown(schedule)}")
    if inputs.get("start_at_step") or inputs.get("add_noise") == "disable":
        left.append("start_at_step, add_noise")


def _size(graph: Graph, name: str, settings: dict[str, object], left: list[str], notes: list[str]) -> None:
    """Of the empty latent that it starts from; or a note that it starts from a picture."""
    for node in graph.upstream(graph.inputs(name).get("latent_image"), "latent"):
        inputs = graph.inputs(node)
        graph.seen.add(node)
        if {"width", "height"} <= inputs.keys() and "Empty" in graph.kind(node):
            for side in ("width", "height"):
                take(settings, left, side, graph.value(inputs[side], side), side)
            if (denoise := graph.value(graph.inputs(name).get("denoise", 1), "denoise")) != 1:
                left.append(f"denoise: {shown(denoise, 20)}")
        elif "VAEEncode" in graph.kind(node):
            if source := graph.linked(inputs.get("pixels")):
                graph.seen.add(source)
            notes.append(needs_picture(graph.value(graph.inputs(name).get("denoise", 1), "denoise")))


def _text(graph: Graph, name: str, side: str, settings: dict[str, object], left: list[str], notes: list[str]) -> str:
    """The prompt on one side of the sampler. What lies on the way, such as a ControlNet, goes on the list of what is left."""
    for node in graph.upstream(graph.inputs(name).get(side), side):
        graph.seen.add(node)
        inputs = graph.inputs(node)
        if "text" not in inputs or not graph.kind(node).startswith("CLIPTextEncode"):
            left.append(graph.kind(node))
            continue
        _clip_skip(graph, inputs.get("clip"), settings, left)
        text = graph.value(inputs["text"], *TEXT_INPUTS)
        if isinstance(text, str):
            return clean(text).strip()
        break
    notes.append(f"its {side} prompt is put together by other nodes, and could not be read")
    return ""


def _clip_skip(graph: Graph, link: object, settings: dict[str, object], left: list[str]) -> None:
    """CLIPSetLastLayer counts -1 for the last layer, where our clip_skip is 0."""
    for node in graph.upstream(link, "clip"):
        if graph.kind(node) == "CLIPSetLastLayer" and node not in graph.seen:
            graph.seen.add(node)
            last = graph.value(graph.inputs(node).get("stop_at_clip_layer"), "stop_at_clip_layer")
            skip = -last - 1 if isinstance(last, int) else last
            take(settings, left, "clip_skip", skip, "CLIPSetLastLayer")


def _models(graph: Graph, name: str, notes: list[str]) -> None:
    """The checkpoint and the LoRAs, by the names of their files."""
    for node in graph.upstream(graph.inputs(name).get("model"), "model"):
        inputs, kind = graph.inputs(node), graph.kind(node)
        if kind in LOADERS:
            notes.append(f"its model is {shown(graph.value(inputs.get('ckpt_name')))}{GIVE_MODEL}")
        elif kind in LORAS:
            weight = shown(graph.value(inputs.get("strength_model", 1), "strength_model"))
            file = shown(graph.value(inputs.get("lora_name"), "lora_name"))
            notes.append(f"it uses the lora {file} at {weight}: give its file with --lora, and --lora_weight {weight}")
        else:
            continue  # it stays among those that are listed
        graph.seen.add(node)
