// The torch side, compiled in one piece: torch's headers, which all of its files include, take longer to read than the
// files to compile. One by one they take three times as long.
#include "torch/autograd.cpp"
#include "torch/call.cpp"
#include "torch/cross_entropy.cpp"
#include "torch/lookup.cpp"
#include "torch/mlp.cpp"
#include "torch/module.cpp"
#include "torch/ops.cpp"
#include "torch/optimizer.cpp"
#include "torch/step.cpp"
