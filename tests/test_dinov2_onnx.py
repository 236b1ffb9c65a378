# SPDX-License-Identifier: Apache-2.0
"""The rebuilt DINOv2: tensor by tensor on a synthetic file, and against onnxruntime on the real one."""

import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from fastprompt.data import assets
from fastprompt.errors import AssetError
from fastprompt.hf.dinov2_onnx import load_dinov2_small

FILE_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def source_model() -> Dinov2Model:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False)
    torch.manual_seed(0)
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def export_like_the_asset(state: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """Write tensors as the asset holds them: old names, anonymous transposed linears, positions in two parts."""
    initializers, nodes = [], []

    def store(name: str, tensor: torch.Tensor) -> None:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name))

    for name, tensor in state.items():
        for new, old in FILE_NAMES.items():
            name = name.replace(new, old)
        if name == "embeddings.position_embeddings":
            store("onnx::Reshape_2", tensor[:, 1:])
            store("onnx::Concat_1", tensor[:, :1])
        elif name.endswith(".weight") and tensor.ndim == 2:
            anonymous, bias = f"onnx::MatMul_{len(nodes)}", f"backbone.{name.removesuffix('weight')}bias"
            store(anonymous, tensor.T)
            nodes.append(helper.make_node("MatMul", ["x", anonymous], [f"product_{anonymous}"]))
            nodes.append(helper.make_node("Add", [bias, f"product_{anonymous}"], [f"sum_{anonymous}"]))
        else:
            store(f"backbone.{name}", tensor)
    store("decoder.final_conv.bias", torch.zeros(1))
    return helper.make_model(helper.make_graph(nodes, "synthetic", [], [], initializers))


@pytest.fixture(scope="module")
def source():
    return source_model().state_dict()


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "synthetic.onnx"
    onnx.save(export_like_the_asset(source), file)
    yield file
    file.unlink()


@pytest.fixture
def damaged(exported, tmp_path):
    """Return a function that edits the graph of a good file and writes the result."""
    file = tmp_path / "damaged.onnx"

    def write(edit):
        model = onnx.load(exported)
        edit(model.graph)
        onnx.save(model, file)
        return file

    yield write
    file.unlink()


def test_every_tensor_arrives_in_its_place(exported, source):
    model = load_dinov2_small(exported)
    assert type(model) is Dinov2Model
    assert not model.training
    state = model.state_dict()
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], source[name]) for name in source)


def test_head_is_fresh_and_follows_the_global_generator(exported, source):
    def load(seed):
        torch.manual_seed(seed)
        return load_dinov2_small(exported, num_labels=3, attn_implementation="eager")

    first, again, other = load(1), load(1), load(2)
    assert type(first) is Dinov2ForImageClassification
    assert first.config.num_labels == 3
    assert first.config._attn_implementation == "eager"
    assert first.classifier.weight.shape == (3, 768)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert all(torch.equal(first.dinov2.state_dict()[name], source[name]) for name in source)


def drop(name):
    def edit(graph):
        kept = [tensor for tensor in graph.initializer if tensor.name != name]
        assert len(kept) == len(graph.initializer) - 1
        del graph.initializer[:]
        graph.initializer.extend(kept)

    return edit


def drop_linear(graph):
    del graph.initializer[next(i for i, t in enumerate(graph.initializer) if t.name == "onnx::MatMul_0")]


def reshape_norm(graph):
    tensor = next(tensor for tensor in graph.initializer if tensor.name == "backbone.layernorm.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(383, np.float32), tensor.name))


def add_twin(graph):
    graph.initializer.append(numpy_helper.from_array(np.zeros((384, 384), np.float32), "onnx::MatMul_twin"))
    graph.node.append(helper.make_node("MatMul", ["x", "onnx::MatMul_twin"], ["twin"]))
    bias = "backbone.encoder.layer.3.attention.attention.key.bias"
    graph.node.append(helper.make_node("Add", [bias, "twin"], ["twin_sum"]))


def add_stranger(graph):
    graph.initializer.append(helper.make_tensor("backbone.registers", TensorProto.FLOAT, [1], [0.0]))


def add_anonymous(graph):
    graph.initializer.append(helper.make_tensor("onnx::Mul_7", TensorProto.FLOAT, [1], [0.0]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("backbone.encoder.layer.7.norm2.bias"), r"encoder\.layer\.7\.norm2\.bias is missing"),
        (drop_linear, r"encoder\.layer\.0\.attention\.\S+\.weight is missing"),
        (drop("onnx::Concat_1"), r"anonymous tensors: onnx::Reshape_2 \[1, 1369, 384\]"),
        (reshape_norm, r"layernorm\.bias has shape \[383\], expected \[384\]"),
        (add_twin, r"two tensors for encoder\.layer\.3\.attention\.attention\.key\.weight"),
        (add_stranger, r"registers is not part of the model"),
        (add_anonymous, r"anonymous tensors: onnx::Mul_7 \[1\]"),
        (lambda graph: graph.ClearField("initializer"), r"anonymous tensors: none"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_tensor_name(damaged, edit, message):
    with pytest.raises(AssetError, match=message + r".*fastprompt assets fetch dinov2-small"):
        load_dinov2_small(damaged(edit))


def test_unreadable_file_is_refused(tmp_path):
    file = tmp_path / "torn.onnx"
    file.write_bytes(b"\xff\xff not protobuf")
    with pytest.raises(AssetError, match="not readable as an ONNX model"):
        load_dinov2_small(file)
    with pytest.raises(AssetError, match="not readable as an ONNX model"):
        load_dinov2_small(tmp_path / "absent.onnx")


def test_missing_asset_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(AssetError, match="fastprompt assets fetch dinov2-small"):
        load_dinov2_small()


@pytest.mark.assets
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_rebuilt_model_matches_onnxruntime_at_the_final_norm(attn_implementation):
    import onnxruntime

    file = onnx.load(assets.entry("dinov2-small"))
    final = next(node for node in file.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    file.graph.output.append(helper.make_tensor_value_info(final, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([final], {"input_image": pixels.numpy()})[0])

    start = time.perf_counter()
    model = load_dinov2_small(attn_implementation=attn_implementation)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        got = model(pixels).last_hidden_state
    difference = (got - expected).abs().max().item()
    print(f"loaded in {seconds:.1f} s; max |difference| {difference:.1e}, max |value| {expected.abs().max():.1f}")
    assert got.shape == (2, 257, 384)
    # 12 layers of float32 in another order: about 50 roundings of the largest value.
    assert difference < 50 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    assert seconds < 30
