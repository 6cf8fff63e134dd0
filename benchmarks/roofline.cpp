// Loops that do nothing but load, copy or multiply: the rates that no other program on this core can pass.
#include <chrono>
#include <cstddef>
#include <cstring>
#ifdef __AVX512F__
typedef float vec __attribute__((vector_size(64)));
#else
typedef float vec __attribute__((vector_size(32)));
#endif
static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
static volatile float sink;

// GB/s of reading `bytes` (a multiple of 1024) again and again
extern "C" double read_rate(const float* data, size_t bytes, double seconds) {
    const vec* v = reinterpret_cast<const vec*>(data);
    const size_t n = bytes/sizeof(vec);
    vec a[8] = {};
    double start = now(), spent; size_t turns = 0;
    do {
        for (size_t r = 0, m = 1 + (1u << 20)/bytes; r < m; r++, turns++) {
            for (size_t i = 0; i + 8 <= n; i += 8) for (int k = 0; k < 8; k++) a[k] += v[i+k];
            asm volatile("" ::: "memory");
        }
        spent = now() - start;
    } while (spent < seconds);
    for (int k = 1; k < 8; k++) a[0] += a[k];
    sink = a[0][0];
    return 1e-9*bytes*turns/spent;
}

// GB/s of memcpy, counted once
extern "C" double copy_rate(float* to, const float* from, size_t bytes, double seconds) {
    double start = now(), spent; size_t turns = 0;
    do { memcpy(to, from, bytes); turns++; spent = now() - start; } while (spent < seconds);
    sink = to[bytes/8];
    return 1e-9*bytes*turns/spent;
}

// GFLOP/s of fused multiply-adds in registers: twelve chains, more than latency times units
extern "C" double fma_rate(double seconds) {
    vec b = {}, c = {};
    b += 0.999f; c += 0.001f;
    vec a0 = c, a1 = c*2.f, a2 = c*3.f, a3 = c*4.f, a4 = c*5.f, a5 = c*6.f, a6 = c*7.f, a7 = c*8.f, a8 = c*9.f, a9 = c*10.f, aa = c*11.f, ab = c*12.f;
    double start = now(), spent; size_t turns = 0;
    do {
        for (int r = 0; r < 10000; r++, turns++) {
            a0 = a0*b + c; a1 = a1*b + c; a2 = a2*b + c; a3 = a3*b + c; a4 = a4*b + c; a5 = a5*b + c;
            a6 = a6*b + c; a7 = a7*b + c; a8 = a8*b + c; a9 = a9*b + c; aa = aa*b + c; ab = ab*b + c;
        }
        spent = now() - start;
    } while (spent < seconds);
    a0 += a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + aa + ab;
    sink = a0[0];
    return 1e-9*turns*12*2*(sizeof(vec)/sizeof(float))/spent;
}
