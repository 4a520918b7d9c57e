#!/usr/bin/env bash
# Installs the Debian packages that building needs, and only those that are missing. Unattended and repeatable.
# Debian 12, Ubuntu 22.04 and 24.04. With --checks also the tools of scripts/check.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

packages=(
  ca-certificates g++ cmake ninja-build ccache git pkg-config python3 python3-pip unzip
  catch2 libcli11-dev libcpp-httplib-dev libeigen3-dev libgloo-dev libpcre2-dev libutf8proc-dev libyaml-cpp-dev librapidcheck-dev nlohmann-json3-dev
)
case "${1:-}" in
  "") ;;
  --checks) packages+=(clang-format-14 codespell shellcheck) ;;
  *) echo "usage: $0 [--checks]" >&2; exit 2 ;;
esac

is_installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "This script knows Debian and Ubuntu only. Install by other means: ${packages[*]}" >&2
  exit 1
fi
missing=()
for package in "${packages[@]}"; do is_installed "$package" || missing+=("$package"); done
if [ ${#missing[@]} -eq 0 ]; then
  say "Debian packages: all ${#packages[@]} are installed"
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "Missing packages: ${missing[*]}. Run this script as root, or install sudo." >&2
    exit 1
  fi
  as_root=(sudo)
fi
apt_get() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@"
}
# Package lists may be there already; the download of the lists is then not worth the time.
if ! apt-cache show "${missing[@]}" >/dev/null 2>&1; then
  step "Updating the package lists" "check the network and /etc/apt/sources.list, then run this script again" apt_get update
fi
install_packages() {
  apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null ||
    { apt_get update && apt_get install -y --no-install-recommends "${missing[@]}"; }
}
step "Installing ${missing[*]}" "read apt's message above; on Ubuntu the universe repository must be enabled" install_packages
