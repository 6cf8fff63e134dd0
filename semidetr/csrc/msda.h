// Multi-scale deformable attention on a CPU: what the binding (msda_ops.cpp) and the kernels (msda_kernel.h) agree on.
// No torch header and no inline std function may come in here: the kernels are compiled for several instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>

namespace semidetr {

enum Type : int { kFloat = 0, kDouble = 1, kBFloat16 = 2 };

constexpr int kMaxPoints = 128;  // levels * points of one head
constexpr int kMaxLevels = 16;

// One call. All tensors are contiguous. "real" = double where the value is double, else float.
struct Problem {
  Type type;                 // of value, out, grad_out, grad_value
  int64_t B, S, M, D, Q, L, P;
  int32_t h[kMaxLevels], w[kMaxLevels], start[kMaxLevels];
  const void* value;         // (B,S,M,D)
  // plain form
  const void* loc;           // (B,Q,M,L,P,2) real, (x,y) in [0,1]
  const void* weight;        // (B,Q,M,L,P) real
  // fused form: ref_dim is 2 or 4 (0 = plain form)
  int ref_dim;
  Type raw;                  // of offsets, logits and their gradients: real, or bfloat16 for a bfloat16 value
  const void* ref;           // (B,Q,L,ref_dim) real
  const void* off;           // (B,Q,M,L,P,2)
  const void* logit;         // (B,Q,M,L*P)
  const uint8_t* mask;       // (B,S), 1 = padding, or null
  // results
  void* out;                 // (B,Q,M,D)
  const void* grad_out;      // (B,Q,M,D)
  void* grad_value;          // (B,S,M,D)
  void* grad_loc;            // like loc, or like off
  void* grad_weight;         // like weight, or like logit
  void* grad_ref;            // (B,Q,L,ref_dim) real, or null
  void* part_ref;            // (B,M,Q,L,ref_dim) real: its summands by head, or null
  void* part_weight;         // (B,Q,M,L*P) real: gradient of the softmax's result; only with `by_level`
  // how the work is cut; the results do not depend on it
  int chunks;                // forward: parts of the query axis
  bool by_level;             // backward: a task is (image, head, level) instead of (image, head)
  bool stream;               // backward: the gradients are large; write them past the caches
};

struct Kernels {
  const char* name;
  // Does the backward pass add straight into grad_value (which must then be zero), or write all of it?
  bool (*needs_zero)(const Problem&);
  size_t (*scratch)(const Problem&, bool backward);                       // bytes for one thread, 64-byte aligned
  void (*forward)(const Problem&, int64_t, int64_t, void* scratch);       // tasks of B*M*chunks
  void (*backward)(const Problem&, int64_t, int64_t, void* scratch);      // tasks of B*M*(by_level ? L : 1)
  void (*finish)(const Problem&, int64_t, int64_t);                       // rows of B*Q, after backward, fused form only
};

const Kernels& kernels_base();
const Kernels& kernels_v3();
const Kernels& kernels_v4();

}  // namespace semidetr
