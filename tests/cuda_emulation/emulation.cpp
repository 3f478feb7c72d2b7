#include "emulation.hpp"

/// How the next launches are emulated.
extern "C" void emulation_configure(uint64_t seed, int late_copies, int late_products, int broken) {
  emulation::machine.seed = seed;
  emulation::machine.late_copies = late_copies;
  emulation::machine.late_products = late_products;
  emulation::machine.broken = broken;
}
