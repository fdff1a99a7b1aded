#!/usr/bin/env bash
# Fetch Fashion-MNIST (MIT licence, 31 MB) from Debian's package dataset-fashion-mnist into
# data/fashion-mnist. Needs apt and dpkg-deb, but neither root nor an installation.
#
#   scripts/prepare_fashion_mnist.sh [FOLDER]
set -euo pipefail

package=dataset-fashion-mnist
target=${1:-"$(cd "$(dirname "$0")/.." && pwd)/data/fashion-mnist"}
files=(train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz
       t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz)

fail() {
    echo "prepare_fashion_mnist: $1" >&2
    exit 1
}

complete() { # all four files in folder $1, and none of them damaged
    local file
    for file in "${files[@]}"; do
        gzip --test "$1/$file" 2>/dev/null || return 1
    done
}

if complete "$target"; then
    echo "Fashion-MNIST is already in $target"
    exit 0
fi

installed=/usr/share/datasets/fashion-mnist
if complete "$installed"; then
    echo "Fashion-MNIST is installed in $installed, where it is found by itself"
    [ $# -eq 0 ] && exit 0
fi

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "this system has no $tool. Download the four files \
${files[*]} yourself and put them into $target."
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt drops to the user _apt when root downloads, who must be able to write here
chmod 755 "$work"

if ! (cd "$work" && apt-get -o APT::Sandbox::User= download "$package" >apt.log 2>&1); then
    sed 's/^/    /' "$work/apt.log" >&2
    fail "apt-get could not download $package. If it says that the package cannot be found, its \
lists are missing or old: run 'apt-get update' as root once (the package is in Debian's and \
Ubuntu's main and universe sections), then run this again."
fi

dpkg-deb -x "$work"/"$package"_*.deb "$work/unpacked"
complete "$work/unpacked$installed" || fail "the package does not hold the four expected files \
${files[*]} in $installed. Report this with the version of the package."

# a folder that is there is whole: copy beside it, then rename
mkdir -p "$(dirname "$target")"
rm -rf "$target.part"
mkdir "$target.part"
for file in "${files[@]}"; do
    cp "$work/unpacked$installed/$file" "$target.part/"
done
if [ -d "$target" ]; then
    mv "$target.part"/* "$target/"
    rmdir "$target.part"
else
    mv "$target.part" "$target"
fi
echo "Fashion-MNIST is in $target"
