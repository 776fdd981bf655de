#!/usr/bin/env bash
# build.sh ARCH VERSION SOURCE OUT: builds the lab's host kernel.
#   ARCH     x86_64 or aarch64
#   VERSION  upstream series of the source, such as 7.3
#   SOURCE   unpacked kernel source
#   OUT      folder that receives vmlinuz-VERSION-ARCH and config-VERSION-ARCH
# Needs flex, bison, bc, libelf-dev, libssl-dev and, to build for another architecture, its compiler. Ten minutes and more.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
arch=$1 version=$2 source=$(realpath "$3") out=$(realpath -m "$4")
case $arch in
  x86_64) kernel_arch=x86_64 image=arch/x86/boot/bzImage ;;
  aarch64) kernel_arch=arm64 image=arch/arm64/boot/Image ;;
  *) echo "build.sh: unknown architecture '$arch'" >&2; exit 2 ;;
esac
cross=
[ "$(uname -m)" = "$arch" ] || cross=$arch-linux-gnu-
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
mkdir -p "$out"
# The same image from the same source, whoever builds it.
export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab
make=(make -s -C "$source" O="$objects" ARCH="$kernel_arch" CROSS_COMPILE="$cross")
"${make[@]}" tinyconfig > /dev/null 2>&1
sed -i '/CONFIG_CC_OPTIMIZE_FOR_SIZE=y/d' "$objects/.config"
cat "$here/common.config" "$here/$arch.config" > "$objects/fragment"
(cd "$source" && scripts/kconfig/merge_config.sh -m -O "$objects" "$objects/.config" "$objects/fragment" > /dev/null)
"${make[@]}" olddefconfig
"${make[@]}" -j"$(nproc)" "${image##*/}"
# The configuration goes last: an image counts only together with it, so a half-written pair never does.
cp "$objects/$image" "$out/vmlinuz-$version-$arch"
cp "$objects/.config" "$out/config-$version-$arch"
