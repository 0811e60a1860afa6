"""The int4 matmul of ONNX Runtime (MatMulNBits) and OpenVINO (u4 constant) on a PackedTensor, one session per copy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat.packing import PackedTensor

ENVIRONMENT = Path("build/peers-env")


def peers_path() -> str:
    """Where the peers' packages are; to be put last, so that this environment's own come first."""
    found = sorted(ENVIRONMENT.glob("lib/python*/site-packages"))
    return str(found[0].resolve()) if found else str(ENVIRONMENT)


def nibbles(weight: PackedTensor) -> Any:
    """uint8 [N, K / 2], low nibble first, codes from 0 to 15: the canonical bytes are that already."""
    return weight.packed.numpy()


def ort_op(weight: PackedTensor, level: int, threads: int, count: int) -> list[Any]:
    """MatMulNBits with that accuracy level: 4 computes with int8 inputs, 0 with float ones."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    size = weight.spec.group_size
    assert size
    codes = nibbles(weight).reshape(n, k // size, size // 2)
    scale = weight.scale.numpy().reshape(-1)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": size, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "B", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(scale, "s")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    # each session has threads of its own, which would spin into the calls of the next copy and the next contender
    options.add_session_config_entry("session.force_spinning_stop", "1")
    data = model.SerializeToString()
    sessions = [onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]) for _ in range(count)]
    return [partial(_ort_run, session) for session in sessions]


def _ort_run(session: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino_run(request: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(next(iter(request.infer([x.numpy()]).values())))


def openvino_op(weight: PackedTensor, threads: int, count: int) -> list[Any]:
    """A u4 constant with float16 scales; the plugin keeps it in 4 bits and quantizes inputs in groups of 32."""
    import numpy as np
    import openvino
    from openvino import opset15 as op

    n, k = weight.shape
    size = weight.spec.group_size
    assert size
    shape = [n, k // size, size]
    calls = []
    core = openvino.Core()
    for _ in range(count):
        tensor = openvino.Tensor(openvino.Type.u4, openvino.Shape(shape))
        tensor.data[:] = nibbles(weight).reshape(tensor.data.shape)
        half = op.convert(op.constant(tensor), np.float16)
        centred = op.subtract(half, op.constant(np.float16(8)))
        scaled = op.multiply(centred, op.constant(weight.scale.numpy().reshape(n, k // size, 1).astype(np.float16)))
        matrix = op.convert(op.reshape(scaled, op.constant(np.array([n, k])), False), np.float32)
        x = op.parameter([-1, k], np.float32)
        model = openvino.Model([op.matmul(x, matrix, False, True)], [x])
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = size
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        calls.append(partial(_openvino_run, request))
    return calls
