#!/bin/sh
# Builds the C++ self-test under AddressSanitizer and UndefinedBehaviorSanitizer, and runs it. Needs no Python.
set -eu
source=$(dirname "$0")
build=${1:-"$source/../../build/sanitize"}
cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Debug -DTIGHTROPE_SELF_TEST=ON -DTIGHTROPE_SANITIZE=ON
cmake --build "$build" -j2
UBSAN_OPTIONS=print_stacktrace=1 "$build/self_test"
