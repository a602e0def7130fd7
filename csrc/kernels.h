// The border between torch and the kernels: what a backend offers, in plain structs and pointers.
//
//   z = x Wᵀ + b     y = g(z)                    x [M, K]   W [N, K]   b [N]   y, z [M, N]
//   dz = dy · g'(y)  dW = dzᵀ x   db = Σ dz   dx = dz W
//
// Matrices are row-major. x and W may have rows further apart than they are long (ldx, ldw, in elements;
// 0 repeats one row); everything else is contiguous. All pointers of a call are of one dtype.
// Any of M, N, K may be 0: a sum over nothing is 0.
#pragma once

#include <cstdint>

namespace fastmlp {

// g, a row of the table in activation.h: Activation::relu and so on.
struct Activation {
  enum Kind : int;
  Kind kind = Kind(0);
  float parameters[3] = {};  // the row's, in its order
};
constexpr bool operator==(const Activation& g, Activation::Kind kind) { return g.kind == kind; }
constexpr bool operator!=(const Activation& g, Activation::Kind kind) { return g.kind != kind; }

enum class Dtype : int { float32, bfloat16, float16 };

// One layer's forward pass.
//
// A network is an array of layers, from the first to the last. A y is null where only the next layer reads it, and then
// that layer's x is null too: the backend finds a place for it.
//
// z is what backward will read where g' is found from z (see Reads in activation.h). y is g of z as it is stored, or
// would be.
struct Forward {
  Dtype dtype;
  bool reduced;  // float32 may be multiplied in less precision, where that is faster: its user asked for it
  Activation activation;
  int64_t M, N, K;
  const void* x;  // [M, K]
  int64_t ldx;
  const void* weight;  // [N, K]
  int64_t ldw;
  const void* bias;   // [N], or null for none
  void* y;            // [M, N]
  void* z = nullptr;  // [M, N], or null where it is not wanted; only where the activation reads z
};

struct Trained;

// One layer's backward pass.
//
// A network is an array of layers, from the last to the first. Between two of them dy is the backend's own: every
// grad_x but the last's and every grad_y but the first's are null.
//
// Where the layer below has saved its z and not its y, that z is given for x, without gaps, and its activation: x is
// found from it.
struct Backward {
  Dtype dtype;
  bool reduced;
  Activation activation;
  int64_t M, N, K;
  const void* grad_y;  // [M, N]
  const void* saved;   // [M, N], y or z as the activation reads; not read (may be null) for the identity
  const void* x;       // [M, K], not read when grad_weight is null
  int64_t ldx;
  const void* weight;  // [N, K], not read when grad_x is null
  int64_t ldw;
  // The outputs; one that is null is not computed.
  void* grad_x;                  // [M, K]
  void* grad_weight;             // [N, K]
  void* grad_bias;               // [N]
  Activation x_activation = {};  // x is this of what is given for it
  // On the CPU, of float32: parameters that are changed by their gradients, which then need no memory; or null.
  const Trained* trained_weight = nullptr;
  const Trained* trained_bias = nullptr;
};

// One step of an optimizer, as torch.optim defines it. For each element of a parameter w, whose gradient is dW:
//
//   g = dW + weight_decay · w        with −dW in place of dW to maximize
//
//   sgd    m = momentum · m + undamped · g     or g in the first step, where there is a state m;
//          g = m                               or g + momentum · m after Nesterov
//          w = w − rate · g
//   adam   m = m + undamped · (g − m)     v = momentum_square · v + undamped_square · g²
//          u = max(u, v)                       where there is a third state, else v
//          w = kept · w − rate · m / (√u · inverse_root + eps)
//
// It is computed in float32, whatever the dtype.
struct Optimizer {
  enum Kind : int { sgd, adam };
  Kind kind;
  Dtype dtype;
  int states;  // tensors beside each parameter: 0 or 1 for sgd, 2 or 3 for adam
  float weight_decay, momentum, undamped;
  float momentum_square, undamped_square, eps, kept;  // of adam alone; kept = 1 − lr · decoupled weight decay
  bool maximize, nesterov, first;                     // the last two of sgd alone
  // On CUDA: the line above, and the floats, are read from each tensor's StepNumbers when the kernel runs.
  bool in_memory = false;
};

// What depends on the learning rate, and on how often a tensor has been changed: for sgd rate = lr; for adam
// lr / (1 − beta1ᵗ), and inverse_root = 1 / √(1 − beta2ᵗ).
struct Rates {
  float rate, inverse_root;
};

// What a step of one tensor depends on beside it. In memory it may change from run to run of a kernel that is captured.
struct StepNumbers {
  Optimizer optimizer;
  Rates rates;
};

inline constexpr int most_states = 3;

// A tensor of the step. No two may overlap.
struct Update {
  void* param;       // w [size]
  const void* grad;  // dW [size]
  void* states
      [most_states];  // [size] each, as many as the optimizer has; only written in the first step of sgd
  int64_t size;
  union {
    Rates rates;
    const StepNumbers* numbers;  // where they are in memory
  };
};

// Gradients made no longer than max_norm together, as torch.nn.utils.clip_grad_norm_ does it:
//
//   norm = √Σ g²     over all elements of all gradients, in float64, where no square overflows
//   g = g · min(1, max_norm / (norm + 1e-6))     which a norm that is NaN makes NaN
struct Clip {
  Dtype dtype;  // of the gradients and the norm
  double max_norm;
  bool only_finite;  // whether gradients whose norm is not finite stay as they are
  void* norm;        // one, of the gradients as they were given
};

// A tensor of it. No two may overlap.
struct Gradient {
  void* data;  // g [size]
  int64_t size;
};

enum class Reduction : int { none, mean, sum };

// The loss of a classifier with logits z [N, C] and targets t [N], and its gradient:
//
//   p = softmax(z)     q_c = w_c ((1 - ε) [c = t] + ε / C)
//   loss = -Σ_c q_c log p_c     dz = p Σ_c q_c - q
//
// A row whose target is ignore_index has the loss and the gradient 0. The mean, and its gradient, are the sums
// divided by Σ w_t of the rows that are not ignored.
struct CrossEntropy {
  Dtype dtype;  // of the logits and the loss; the rest is float32
  Reduction reduction;
  int64_t N, C;           // C is not 0
  const void* input;      // z [N, C]
  const int64_t* target;  // t [N]
  const float* weight;    // w [C], or null for ones
  int64_t ignore_index;
  float label_smoothing;  // ε, from 0 to 1
  void* loss;             // [N], or one where it is reduced
  float* grad;            // dz [N, C], or null where it is not wanted
};

// The losses that a step knows: cross_entropy as above, and the mean or the sum over all elements of, with d = y - t,
//
//   mse               d²
//   l1                |d|
//   smooth_l1         d² / 2β  where |d| < β, else |d| - β / 2
//   huber             d² / 2   where |d| <= δ, else δ (|d| - δ / 2)
//   bce_with_logits   w (p t log(1 + e^-y) + (1 - t) log(1 + e^y))
//
// Or the gradient of a loss is given that the caller has found.
enum class Loss : int { cross_entropy, mse, l1, smooth_l1, huber, bce_with_logits, given };

// A loss of one element at a time, for an output of shape [M, N].
struct Pointwise {
  int64_t N;
  const float* target;               // t [M, N]
  const float *weight, *pos_weight;  // w, p [N], or null for ones; of the binary cross-entropy
  float bound;                       // β, δ, which is positive
  bool mean;                         // or the sum
};

// A parameter of a step, which changes it as `optimizer` says; where that is null it stays as it is. Its gradient is the
// step's.
struct Trained {
  const Optimizer* optimizer;
  Update update;
};

// A whole training step: forward, loss, backward, and the update of the parameters. float32.
struct Step {
  int64_t count;
  const Forward* layers;  // every x but the first's and every y are null, but where the gradient is given
  const Trained *weights, *biases;  // of each layer; a weight is [N, K] without gaps
  Loss loss;
  CrossEntropy cross_entropy;  // where that is the loss; input, loss and grad are not read
  Pointwise pointwise;         // where it is of elements
  const float* gradient;       // dy [M, N], where it is given: layers have been computed, and kept y or z
  float* value;     // where the loss goes, of the parameters before the update; null where dy is given
  double max_norm;  // all gradients are clipped to this norm together; 0 for no bound
  float* norm;      // where the norm goes that they had, where there is a bound
  // On CUDA: so many steps, one after the other. The next one's x and target lie so many elements behind, its numbers in
  // memory so many StepNumbers, its value one element. Without numbers in memory, all have the first one's. The norm is the
  // last one's.
  int64_t steps = 1, x_step = 0, target_step = 0, numbers_step = 0;
};

namespace cpu {

// The instruction sets, best first, and the one in use: the processor's best until use() chooses another.
inline constexpr const char* instruction_sets[] = {"avx512bf16", "avx512", "avx2", "portable"};
const char* instruction_set();
bool supports(const char* instruction_set);  // by this build and this processor
bool use(const char* instruction_set);       // false, and nothing changed, where it is not supported

// False where the processor multiplies this dtype by instructions of its own, which torch's library uses and
// the kernels do not: bfloat16 with AMX. float32 and bfloat16 are covered after use(), which asks for the kernels.
bool covers(Dtype);

// float32 and bfloat16. `count` layers of a network, in one parallel region. `threads` is the size of the caller's
// OpenMP pool; where it is 1, or the work too little to share, no region is opened. `workspace` has as many bytes
// as asked for with the same arguments, is 64-byte aligned, and its contents are arbitrary.
int64_t forward_workspace(const Forward* layers, int64_t count, int threads);
void forward(const Forward* layers, int64_t count, void* workspace, int threads);
int64_t backward_workspace(const Backward* layers, int64_t count, int threads);
void backward(const Backward* layers, int64_t count, void* workspace, int threads);
void optimize(const Optimizer&, const Update* updates, int64_t count, int threads);  // of `count` tensors
void clip(const Clip&, const Gradient* gradients, int64_t count, int threads);

// Row i of `to` becomes row rows[i] of `from`, for i < count. Rows are of so many bytes, and lie without gaps.
void gather(const void* from, const int64_t* rows, int64_t count, int64_t bytes, void* to, int threads);

// Returns -1, or the first row whose target is neither a class nor ignore_index: nothing is written then.
int64_t cross_entropy_workspace(const CrossEntropy&);
int64_t cross_entropy(const CrossEntropy&, void* workspace, int threads);

// As above: nothing is changed where a target is wrong.
int64_t train_workspace(const Step&, int threads);
int64_t train(const Step&, void* workspace, int threads);

// The same of several networks, each as it is alone, to the bit. Those of `layers` have `count` layers each, and follow one
// another. The wrong target's row is counted through all of them.
int64_t forward_workspace(const Forward* layers, int64_t count, int64_t networks, int threads);
void forward(const Forward* layers, int64_t count, int64_t networks, void* workspace, int threads);
int64_t backward_workspace(const Backward* layers, int64_t count, int64_t networks, int threads);
void backward(const Backward* layers, int64_t count, int64_t networks, void* workspace, int threads);
int64_t train_workspace(const Step* steps, int64_t networks, int threads);
int64_t train(const Step* steps, int64_t networks, void* workspace, int threads);

}  // namespace cpu

namespace cuda {

const char* toolkit();        // the version of the toolkit that built the kernels: "13.0"
const char* architectures();  // what they were built for: "800,900"
bool runs_on(int device);     // whether a GPU has code among them, or by their PTX; asked for once

// The same for float32, bfloat16 and float16. Work is enqueued on `stream` (a cudaStream_t) of the current device;
// nothing here allocates or synchronises, so a call can be captured in a graph. Returns a cudaError_t, 0 for
// success.
int64_t forward_workspace(const Forward* layers, int64_t count);
int forward(const Forward* layers, int64_t count, void* workspace, void* stream);
int64_t backward_workspace(const Backward* layers, int64_t count);
int backward(const Backward* layers, int64_t count, void* workspace, void* stream);
int optimize(const Optimizer&, const Update* updates, int64_t count, void* stream);
int64_t clip_workspace(const Clip&, const Gradient* gradients, int64_t count);
int clip(const Clip&, const Gradient* gradients, int64_t count, void* workspace, void* stream);

// A target that is neither a class nor ignore_index fails an assertion on the device, as in torch.
int64_t cross_entropy_workspace(const CrossEntropy&);
int cross_entropy(const CrossEntropy&, void* workspace, void* stream);

// A step, or several, in one launch: of networks of two layers or more that are small enough for it to be faster than a
// graph of the others, on the current device. `widths` are the first K and each layer's N. The loss is none that is given.
// The workspace, of −1 bytes where it is no such step, is all 0 when it is first used, and used by nothing else then.
bool is_one_launch(int64_t M, const int64_t* widths, int64_t layers, bool clips);
int64_t train_workspace(const Step&);
int train(const Step&, void* workspace, void* stream);

// ---- whose the products are
//
// A product is a kernel's, or torch's library's, with as few passes around it as torch has: where no kernel was measured
// to be faster, the call is torch's own. All products of a narrow network in one kernel count as one.

// C [rows, columns] = A [rows, K] B [K, columns] (+ bias), on the current device and stream.
struct Product {
  struct Operand {
    const void* data;
    int64_t strides[2];  // in elements
  };
  Dtype dtype;
  int64_t rows, columns, K;
  Operand a, b;
  const void* bias;  // [columns], or null
  void* c;           // without gaps
};
using Library = void (*)(const Product&);

enum class Kind : int { forward, dW, dx, chain_forward, chain_backward };
enum class Owner : int { table, kernels, library };

// A row of the table: for an architecture (90), and from 2^size operations up to twice as many.
struct Measured {
  int architecture;
  Dtype dtype;
  bool reduced;
  Kind kind;
  int size;
  Owner owner;
};

// Whose all products are from now on; by the table, what it does not know is the library's from 0.1 GFLOP on. Without a
// library all are the kernels'. To be called once, before the first product.
void set_products(Library library, Owner owner, const Measured* table, int64_t count);
Owner owner_of(Kind kind, Dtype dtype, bool reduced, double operations);  // on the current device

}  // namespace cuda

}  // namespace fastmlp
