// All kernels, for the instruction set that this object is compiled for: SK_NAME names its table.
#include "kernels.h"

#include <type_traits>

#include "simd.h"

#include "linear.inc.h"

#include "rows.inc.h"

#include "attention.inc.h"
#include "weights.inc.h"

#define SK_TEXT_OF(name) #name
#define SK_TEXT(name) SK_TEXT_OF(name)
#define SK_JOIN_OF(a, b) a##b
#define SK_JOIN(a, b) SK_JOIN_OF(a, b)

namespace servekit {

const Kernels SK_JOIN(SK_NAME, _kernels) = {
    SK_TEXT(SK_NAME), sizeof(BF16::Value) == 2, linear, norm, convert, rotary, attention, combine, argmax,
    pack_i8, pack_i4, peak,
};

}  // namespace servekit
