// The torch side, compiled in one piece: torch's headers, which all of its files include, take longer to read than the
// files to compile. One by one they take three times as long.
#include "torch/activations.cpp"
#include "torch/autograd.cpp"
#include "torch/call.cpp"
#include "torch/chain.cpp"
#include "torch/checks.cpp"
#include "torch/clip.cpp"
#include "torch/cross_entropy.cpp"
#include "torch/ensemble.cpp"
#include "torch/ensemble_step.cpp"
#ifdef FASTMLP_WITH_CUDA
#include "torch/library.cpp"
#endif
#include "torch/lookup.cpp"
#include "torch/module.cpp"
#include "torch/module_call.cpp"
#include "torch/network.cpp"
#include "torch/optimizer.cpp"
#include "torch/predictor.cpp"
#include "torch/step.cpp"
#include "torch/training.cpp"
