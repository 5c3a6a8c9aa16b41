"""Names of operators that other rooms treat in one way, such as the layers of a network."""

LINEAR = {"linear.default"}
CONVOLUTIONS = {f"conv{d}d.{form}" for d in (1, 2, 3) for form in ("default", "padding")}
LAYERS = LINEAR | CONVOLUTIONS
"""Operators with a weight whose rows make units and whose columns read units."""

ELEMENTWISE = {
    *("relu.default", "relu6.default", "leaky_relu.default", "elu.default", "selu.default"),
    *("gelu.default", "silu.default", "mish.default", "hardswish.default", "softplus.default"),
    *("tanh.default", "hardtanh.default", "sigmoid.default", "softmax.int", "log_softmax.int"),
    *("exp.default", "sin.default", "cos.default", "abs.default", "neg.default", "sqrt.default"),
    *("rsqrt.default", "square.default", "pow.Tensor_Scalar", "clamp.default"),
    *("add.Scalar", "mul.Scalar"),
    *("dropout.default", "to.dtype"),
}
SPATIAL = {
    *("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"),
    *("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default"),
    *("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default"),
    *("adaptive_max_pool2d.default", "pad.default", "constant_pad_nd.default"),
}
