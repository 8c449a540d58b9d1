"""``sparse-rt export --to onnx``: options, the choice of the function body, files and their README."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sparse_rt.checkpoint import Checkpoint, read_json
from sparse_rt.config import Options
from sparse_rt.exporters.base import Exporter, register_exporter
from sparse_rt.exporters.folder import copy_side_files, write_dense_config
from sparse_rt.exporters.onnx.body import MAX_FOLDED_WEIGHTS, choose_body, outlook
from sparse_rt.optional import require
from sparse_rt.version import __version__


class OnnxOptions(Options):
    base: Literal["portable", "genai"] = Field(
        "portable",
        description="portable: standard operators; genai: those of onnxruntime-genai's model builder, which ONNX "
        "Runtime alone knows (implies genai=true)",
    )
    form: Literal["function", "inline", "dense"] = Field(
        "function",
        description="function: operators of domain sparse_rt with a body; inline: standard operators only (OpenVINO); "
        "dense: ordinary MatMul on decompressed weights (TensorRT, baselines)",
    )
    body: Literal["auto", "folding", "streaming"] = Field(
        "auto", description="folding: dense speed and memory after load; streaming: compressed in memory, slow calls"
    )
    fold_budget: str | int = Field("4GB", description="largest memory peak of folding at load that auto accepts")
    opset: int = Field(23, ge=18, le=23, description="ONNX operator set")
    values: Literal["keep", "int8"] = Field(
        "keep", description="int8: round the kept values to int8 with scales (keep: as the checkpoint has them)"
    )
    group_size: Literal[64, 128, 256] | None = Field(
        None, description="columns that share a scale with values=int8; null: all of a row"
    )
    activations: Literal["int8", "float32"] = Field(
        "int8", description="what our operators multiply int8 values with: int8 is faster, float32 exact"
    )
    genai: bool = Field(
        False, description="files for onnxruntime-genai: its configuration, and the operators compiled for this machine"
    )

    @model_validator(mode="after")
    def _int8(self):
        if self.values == "int8" and self.form == "dense":
            raise ValueError("values=int8 is for form=function and form=inline; form=dense has no place for scales")
        if self.group_size is not None and self.values != "int8":
            raise ValueError("group_size is for values=int8")
        return self

    @model_validator(mode="after")
    def _genai(self):
        if self.base == "genai":
            if self.form == "inline":
                raise ValueError("form=inline is for base=portable, base=genai allows form=function and form=dense")
            if "opset" in self.model_fields_set:
                raise ValueError("opset is for base=portable, the builder of base=genai has its own; leave it out")
            self.genai = True
        elif self.genai and self.form != "function":
            raise ValueError(f"genai is for form=function, not form={self.form}")
        return self


@register_exporter
class OnnxExporter(Exporter):
    name = "onnx"

    def export(self, source: Path, output: Path, **options: Any) -> dict[str, Any]:
        """``OnnxOptions``; ``UserError`` for a weight that the chosen body cannot carry or an unsupported model."""
        chosen = OnnxOptions.build(**options)
        for module in ("onnx", "onnxscript"):
            require(module, extra="onnx")
        if chosen.base == "genai":
            require("onnxruntime_genai", extra="genai")
        checkpoint = Checkpoint.open(source)
        checkpoint.quantization.refuse_wrapper("the ONNX export has no operator for")
        choose_body(checkpoint, chosen)  # refuses what no body can carry, before any work
        from sparse_rt.exporters.onnx import builder, genai
        from sparse_rt.exporters.onnx.assemble import Assembler
        from sparse_rt.exporters.onnx.encoder import trace_encoder
        from sparse_rt.exporters.onnx.experts import take_experts
        from sparse_rt.exporters.onnx.graph import all_nodes
        from sparse_rt.exporters.onnx.manifest import describe_layers, write_manifest
        from sparse_rt.exporters.onnx.operands import Quantization
        from sparse_rt.exporters.onnx.readme import write_readme
        from sparse_rt.exporters.onnx.rows import JoinedCheckpoint, note
        from sparse_rt.exporters.onnx.skeleton import open_skeleton
        from sparse_rt.exporters.onnx.trace import trace
        from sparse_rt.families import predicts_next_token

        if chosen.genai:
            genai.check_type(read_json(source / "config.json"))
        how = Quantization(chosen.values == "int8", chosen.group_size, chosen.activations)
        how.check(checkpoint)
        model, weights, names = open_skeleton(checkpoint)
        if chosen.genai:
            genai.check_generates(model)
        dense = {weight.owner: weight.rows * weight.columns for weight in weights.values() if weight.kind == "linear"}
        body = choose_body(checkpoint, chosen, sum(dense.values()))
        experts = take_experts(model, chosen.opset)
        if chosen.base == "genai":
            proto, joined = builder.build(model, weights, checkpoint, names, MAX_FOLDED_WEIGHTS)
        else:
            proto, joined = (trace if predicts_next_token(model.config) else trace_encoder)(model, chosen.opset), {}
        form = "dense" if chosen.form == "dense" else "function"
        stored = JoinedCheckpoint(checkpoint, joined)
        assembler = Assembler(output, proto, stored, names, form, how)
        proto = assembler.build(weights, experts)
        layers = describe_layers(assembler, weights)
        note(proto, joined)
        opset = next(entry.version for entry in proto.opset_import if not entry.domain)
        values = "int8" if any(layer.get("values") == "int8" for layer in layers.values()) else "plain"
        facts = {"base": chosen.base, "form": chosen.form, "body": body.name, "opset": opset, "values": values}
        proto = _finish(proto, checkpoint, facts)
        _save(proto, output, chosen)
        write_dense_config(source, output)
        copy_side_files(source, output)
        if chosen.genai:
            genai.write_genai(output, proto, chosen.base, operators=chosen.form == "function")
        write_readme(output, checkpoint, facts, body.fold_bytes)
        facts |= {"body_reason": body.reason, "fold_bytes": body.fold_bytes}
        write_manifest(output, checkpoint, facts, layers)
        counts = {"sparse_weights": len(checkpoint.weights), "nodes": sum(1 for _ in all_nodes(proto.graph))}
        return {**facts, **counts, "notes": [outlook(body)]}

    def check(self, source: Path, output: Path) -> dict[str, Any]:
        from sparse_rt.exporters.onnx.check import check
        from sparse_rt.exporters.onnx.manifest import add_check

        figures = check(source, output)
        add_check(output, figures)
        return figures


def _save(proto: Any, output: Path, options: OnnxOptions) -> None:
    import onnx

    from sparse_rt.exporters.onnx.engine import MODEL_NAME

    (output / MODEL_NAME).write_bytes(proto.SerializeToString())
    if options.base == "portable":  # onnx knows the standard operators only
        onnx.checker.check_model(str(output / MODEL_NAME))


def _finish(proto: Any, checkpoint: Checkpoint, facts: dict[str, Any]) -> Any:
    """Add or inline the functions, name the producer, and write what was chosen into the model's metadata."""
    from onnx import inliner

    from sparse_rt.exporters.onnx import functions
    from sparse_rt.exporters.onnx.graph import all_nodes

    if facts["body"] is not None:
        whole_bytes = all(entry.n % 8 == 0 for entry in checkpoint.weights.values())
        for operator in sorted({node.op_type for node in all_nodes(proto.graph) if node.domain == functions.DOMAIN}):
            proto.functions.append(functions.function(operator, facts["body"], facts["opset"], whole_bytes))
    if facts["form"] == "inline":
        proto = inliner.inline_local_functions(proto)
    if facts["form"] != "function":
        kept = [entry for entry in proto.opset_import if entry.domain != functions.DOMAIN]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
    proto.producer_name, proto.producer_version = "sparse-rt", __version__
    patterns = sorted({entry.pattern for entry in checkpoint.weights.values()})
    notes = {"version": functions.VERSION, "format": "+".join(patterns), **facts}
    for key, value in notes.items():
        if value is not None:
            proto.metadata_props.add(key=f"{functions.DOMAIN}.{key}", value=str(value))
    return proto
