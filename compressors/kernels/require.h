// What a caller must keep to. An error is put into words only where there is one: words cost more than a small call.
#pragma once

#include <stdexcept>

namespace tightrope {

// Throws std::invalid_argument, whose text is `words()`.
template <typename Words>
void require(bool holds, const Words& words) {
  if (!holds) throw std::invalid_argument(words());
}
inline void require(bool holds, const char* words) {
  if (!holds) throw std::invalid_argument(words);
}

}  // namespace tightrope
