"""The translation of a traced JAX function into an ONNX graph, operation by operation.

Why a translator of our own: jax2onnx drops the padding of max pooling and fails on ResNets, and tf2onnx needs TensorFlow,
and a clean graph from it has a fixed batch size (tried with the versions in requirements.txt). The rules below cover what
networks for inference consist of; every export is run by ONNX Runtime and compared with the network.

What depends on the weights alone is computed during the translation, so that the graph holds finished factors.
Convolutions and pooling stand between transpositions because ONNX defines them for (N, C, H, W) only; runtimes remove
the transpositions that cancel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.export import is_symbolic_dim
from jax.extend import core

from simam_jax.errors import UserError

OPSET = 17
IR_VERSION = 8  # the one of that opset: older runtimes read it too

Value = np.ndarray | str  # a constant, or the name of what the graph computes
Rule = Callable[..., Value]  # of the graph, the traced operation and its inputs


def translate(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: Any, names: tuple[str, str]):
    """`function` as an `onnx.ModelProto` with a free batch size.

    Args:
        function: pure, from one array (N, *shape) to one array (N, ...).
        shape, dtype: of the input, without its batch dimension.
        names: of input and output in the graph.

    Raises:
        UserError: the function uses an operation without a rule here.
    """
    from onnx import checker, helper

    (batch,) = jax.export.symbolic_shape("batch")
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), dtype))
    (result,) = traced.out_avals
    graph = _Graph()
    (output,) = _walk(graph, traced.jaxpr, [np.asarray(c) for c in traced.consts], [names[0]])
    graph.nodes.append(helper.make_node("Identity", [graph.name(output)], [names[1]]))

    def described(name: str, aval: Any):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
        return helper.make_tensor_value_info(name, kind, [n if isinstance(n, int) else str(n) for n in aval.shape])

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "network",
            [described(names[0], traced.in_avals[0])],
            [described(names[1], result)],
            graph.constants,
        ),
        producer_name="simam_jax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model, full_check=True)
    return model


class _Graph:
    """The nodes and constants so far."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def name(self, value: Value) -> str:
        """The name of a value in the graph. A constant is added to the graph first."""
        from onnx import numpy_helper

        if isinstance(value, str):
            return value
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operation: str, *inputs: Value, **attributes) -> str:
        """Adds one node; returns the name of its output."""
        from onnx import helper

        output = f"{operation.lower()}_{len(self.nodes)}"
        names = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(operation, names, [output], name=output, **attributes))
        return output


def _walk(graph: _Graph, jaxpr: core.Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """The outputs of `jaxpr`. An operation whose inputs are all constants gives a constant."""
    known: dict[core.Var, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(atom: core.Var | core.Literal) -> Value:
        return np.asarray(atom.val, _type(atom).dtype) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands, name = [value(atom) for atom in equation.invars], equation.primitive.name
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:  # jax.jit and functions with gradients of their own
            results = _walk(graph, inner.jaxpr, [np.asarray(c) for c in inner.consts], operands)
        elif name == "broadcast_in_dim" and any(map(is_symbolic_dim, equation.params["shape"])):
            results = [_broadcast(graph, equation, *operands)]
        elif not any(isinstance(operand, str) for operand in operands):
            results = [np.asarray(equation.primitive.bind(*operands, **equation.params))]
        elif name in _RULES:
            results = [_RULES[name](graph, equation, *operands)]
        else:
            raise UserError(f"There is no rule for JAX's {name!r} in ONNX: export to stablehlo or saved_model.")
        known.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _same(operation: str) -> Rule:
    """The rule of an operation that ONNX has with the same meaning, broadcasting included."""
    return lambda graph, _, *operands: graph.add(operation, *operands)


def _reshape(graph: _Graph, equation: core.JaxprEqn, x: Value) -> Value:
    return graph.add("Reshape", x, np.array([n if isinstance(n, int) else -1 for n in equation.params["new_sizes"]]))


def _type(atom: core.Var | core.Literal) -> jax.ShapeDtypeStruct:
    """Shape and dtype. A size that is no integer is the batch size."""
    return atom.aval  # pyright: ignore[reportReturnType]


def _cast(graph: _Graph, equation: core.JaxprEqn, x: Value) -> Value:
    from onnx import helper

    return graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(_type(equation.outvars[0]).dtype)))


def _broadcast(graph: _Graph, equation: core.JaxprEqn, x: Value) -> Value:
    """Adds axes of size 1. The operations that follow repeat values along axes, because ONNX broadcasts; a scalar stays."""
    if isinstance(x, np.ndarray) and x.ndim == 0:
        return x
    before, shape = _type(equation.invars[0]).shape, equation.params["shape"]
    old = equation.params["broadcast_dimensions"]
    new = [i for i in range(len(shape)) if i not in old]
    _check(equation, before == tuple(shape[i] for i in old) and all(shape[i] == 1 for i in new))
    return graph.add("Unsqueeze", x, np.array(new)) if new else x


def _dot(graph: _Graph, equation: core.JaxprEqn, x: Value, y: Value) -> Value:
    _check(equation, equation.params["dimension_numbers"] == (((1,), (0,)), ((), ())))
    return graph.add("MatMul", x, y)


def _convolution(graph: _Graph, equation: core.JaxprEqn, x: Value, kernel: Value) -> Value:
    parameters = equation.params
    layout = parameters["dimension_numbers"]
    _check(equation, tuple(layout) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)))
    _check(equation, set(parameters["lhs_dilation"] + parameters["rhs_dilation"]) == {1})
    if isinstance(kernel, str):
        raise UserError("ONNX's convolutions are written for constant kernels only.")
    return _as_nchw(
        graph,
        "Conv",
        x,
        kernel.transpose(3, 2, 0, 1),
        strides=parameters["window_strides"],
        pads=_pads(parameters["padding"]),
        group=parameters["feature_group_count"],
    )


def _pool(operation: str, **attributes) -> Rule:
    def rule(graph: _Graph, equation: core.JaxprEqn, x: Value) -> Value:
        parameters = equation.params
        window, strides, padding = parameters["window_dimensions"], parameters["window_strides"], parameters["padding"]
        _check(equation, set(parameters["base_dilation"] + parameters["window_dilation"]) == {1})
        _check(equation, {window[0], window[3], strides[0], strides[3], *padding[0], *padding[3]} <= {0, 1})
        pooled = _as_nchw(
            graph,
            operation,
            x,
            kernel_shape=window[1:3],
            strides=strides[1:3],
            pads=_pads(padding[1:3]),
            **attributes,
        )
        if operation == "AveragePool":  # reduce_window_sum is the sum, not the mean
            return graph.add("Mul", pooled, np.asarray(window[1] * window[2], np.float32))
        return pooled

    return rule


def _as_nchw(graph: _Graph, operation: str, x: Value, *others: Value, **attributes) -> Value:
    x = graph.add("Transpose", x, perm=(0, 3, 1, 2))
    return graph.add("Transpose", graph.add(operation, x, *others, **attributes), perm=(0, 2, 3, 1))


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """All beginnings, then all ends, as ONNX orders them."""
    return [before for before, _ in padding] + [after for _, after in padding]


def _gather(graph: _Graph, equation: core.JaxprEqn, x: Value, indices: Value) -> Value:
    """The two forms that occur: a slice x[..., :1, :], and `jnp.take_along_axis`."""
    parameters, (source, places) = equation.params["dimension_numbers"], map(_type, equation.invars)
    batching = parameters.operand_batching_dims
    if isinstance(indices, np.ndarray):
        _check(equation, indices.ndim == 1 and not batching)
        axes = np.array(parameters.start_index_map)
        ends = indices + np.array([equation.params["slice_sizes"][axis] for axis in axes])
        taken = graph.add("Slice", x, indices.astype(int), ends.astype(int), axes)
        collapsed = np.array(parameters.collapsed_slice_dims, int)
        return graph.add("Squeeze", taken, collapsed) if collapsed.size else taken
    (axis,) = parameters.collapsed_slice_dims
    others = tuple(i for i in range(source.ndim) if i != axis)
    _check(equation, batching == parameters.start_indices_batching_dims == others and places.ndim == source.ndim + 1)
    return graph.add("GatherElements", x, graph.add("Squeeze", indices, np.array([source.ndim])), axis=axis)


def _check(equation: core.JaxprEqn, known: bool) -> None:
    if not known:
        raise UserError(f"This form of JAX's {equation.primitive.name!r} has no rule in ONNX: {equation.params}.")


_RULES: dict[str, Rule] = {
    "add": _same("Add"),
    "argmax": lambda graph, equation, x: _cast(
        graph, equation, graph.add("ArgMax", x, axis=equation.params["axes"][0], keepdims=0)
    ),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda graph, equation, *parts: graph.add("Concat", *parts, axis=equation.params["dimension"]),
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _same("Div"),
    "dot_general": _dot,
    "exp": _same("Exp"),
    "gather": _gather,
    "logistic": _same("Sigmoid"),
    "lt": _same("Less"),
    "max": _same("Max"),
    "min": _same("Min"),
    "mul": _same("Mul"),
    "neg": _same("Neg"),
    "reduce_sum": lambda graph, equation, x: graph.add("ReduceSum", x, np.array(equation.params["axes"]), keepdims=0),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool", count_include_pad=1),
    "reshape": _reshape,
    "select_n": lambda graph, _, which, first, second: graph.add("Where", which, second, first),
    "square": lambda graph, _, x: graph.add("Mul", x, x),
    "stop_gradient": lambda _, __, x: x,
    "sub": _same("Sub"),
}
