#!/bin/sh
# Builds the C++ self-test, warnings being errors, and runs it: plain, then under AddressSanitizer and
# UndefinedBehaviorSanitizer. Needs no Python.
set -eu
source=$(dirname "$0")
build=${1:-"$source/../../build/self_test"}
for sanitize in OFF ON; do
    cmake -S "$source" -B "$build-$sanitize" -DTIGHTROPE_SELF_TEST=ON -DTIGHTROPE_SANITIZE=$sanitize \
        -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
    cmake --build "$build-$sanitize" -j2
    UBSAN_OPTIONS=print_stacktrace=1 "$build-$sanitize/self_test"
done
