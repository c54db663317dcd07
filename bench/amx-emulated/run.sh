#!/bin/bash
# Runs the tests of moebius-kernels on an emulated processor with AMX. README.md beside this file says how and why.
#
#     bench/amx-emulated/run.sh [TEST...]        # parts of test names; default: gemm quantised tiles isa
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
work=${AMX_WORK:-$repository/target/amx-emulated}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
seconds=${AMX_SECONDS:-3600}
filters=("$@")
[ ${#filters[@]} -gt 0 ] || filters=(gemm quantised tiles isa)
root=$work/root
libraries=$root/usr/lib/x86_64-linux-gnu

# Debian's apt with a configuration of its own: another release than the system's, nothing installed.
apt_beside() {
    APT_CONFIG=$work/apt/apt.conf apt-get -qq "$@"
}

# Unpacks a kernel, a boot loader, firmware and busybox, with all they need, into $root.
fetch_packages() {
    [ -e "$work/fetched" ] && return
    rm -rf "$work/apt" "$root" "$work/bochs"
    mkdir -p "$work"/apt/{lists,archives}/partial "$root" "$work/bochs"
    : > "$work/apt/status"
    for archive in "deb trixie" "deb-src trixie" "deb trixie-backports"; do
        echo "${archive% *} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror ${archive#* } main"
    done > "$work/apt/sources.list"
    cat > "$work/apt/apt.conf" <<END
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "$work/apt";
Dir::State::lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt";
Dir::Cache::archives "$work/apt/archives";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
END
    apt_beside update
    apt_beside -y --download-only install \
        base-files bochsbios vgabios linux-image-cloud-amd64/trixie-backports isolinux syslinux-common xorriso busybox-static \
        util-linux
    # base-files first: its symbolic links say where /lib and /bin are.
    for package in "$work"/apt/archives/base-files_*.deb "$work"/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    (cd "$work/bochs" && apt_beside source --download-only --tar-only bochs)
    tar xf "$work"/bochs/bochs_*.orig.tar.* -C "$work/bochs" --strip-components=1
    touch "$work/fetched"
}

# Bochs 3.0 with four repairs.
build_emulator() {
    [ -x "$work/bochs/bochs" ] && return
    cd "$work/bochs"
    # tdpbssd, tdpbsud and tdpbusd take their signed bytes for unsigned ones.
    sed -i -e '/ DPBDSS(Bit32u/,/^}/ s/Bit8u/Bit8s/g' \
        -e '/ DPBDSU(Bit32u/,/^}/ { /xbyte\[4\]/ s/Bit8u/Bit8s/g }' \
        -e '/ DPBDUS(Bit32u/,/^}/ { /ybyte\[4\]/ s/Bit8u/Bit8s/g }' cpu/avx/amx.cc
    # vcvtne2ps2bf16 reads its second half from behind the register.
    sed -i 's/fp32_to_bfloat16(op1.vmm32u(n))/fp32_to_bfloat16(op1.vmm32u(n - DWORD_ELEMENTS(len)))/' \
        cpu/avx/avx512_bf16.cc
    # The displacement of vdpbf16ps counts in vectors, not in words.
    sed -i '/VDPBF16PS/ s/OP_mVdq32/OP_mVdq/' cpu/decoder/ia_opcodes_evex.def
    # Linux gives nobody tiles unless the processor says that it can trap their first use.
    sed -i 's/leaf->eax |= (1<<3);/leaf->eax |= (1<<3) | (is_cpu_extension_supported(BX_ISA_AMX) ? 1<<4 : 0);/' \
        cpu/cpuid.cc
    if [ "$(grep -c Bit8s cpu/avx/amx.cc)" -lt 4 ] || ! grep -q 'n - DWORD' cpu/avx/avx512_bf16.cc ||
        ! grep -q 'VDPBF16PS.*OP_mVdq,' cpu/decoder/ia_opcodes_evex.def || ! grep -q '1<<4 : 0' cpu/cpuid.cc; then
        echo "this Bochs is not the one that run.sh knows how to repair" >&2
        exit 1
    fi
    CFLAGS=-O2 CXXFLAGS=-O2 ./configure --with-nogui --disable-plugins --disable-docbook --enable-cpu-level=6 \
        --enable-x86-64 --enable-avx --enable-evex --enable-amx --enable-cet --enable-protection-keys \
        --enable-perfmon --enable-memtype --enable-pci --enable-all-optimizations > "$work/configure.log"
    nice -n 19 make > "$work/make.log" 2>&1 || { tail -20 "$work/make.log" >&2; exit 1; }
}

# The tests as one static program; prints its path.
build_tests() {
    cd "$repository"
    RUSTFLAGS="-C target-feature=+crt-static" cargo test -p moebius-kernels --release --lib --no-run \
        --target x86_64-unknown-linux-gnu --target-dir "$work/build" --message-format json |
        sed -n 's/.*"executable":"\([^"]*moebius_kernels[^"]*\)".*/\1/p' | tail -1
}

# A disk that boots Linux, runs the tests as its only program, and switches off.
#
# The emulator does not trap the first use of tiles, so Linux does not know that a thread has data in them and would not
# keep them for it while another runs; hence chrt: no thread of ours is put aside before it waits.
make_disk() {
    rm -rf "$work/init" "$work/disk"
    mkdir -p "$work"/init/{bin,proc,sys,dev,lib64,lib/x86_64-linux-gnu} "$work/disk"
    cp "$root/usr/bin/busybox" "$root/usr/bin/chrt" "$work/init/bin/"
    cp "$libraries/libc.so.6" "$work/init/lib/x86_64-linux-gnu/"
    cp "$libraries/ld-linux-x86-64.so.2" "$work/init/lib64/"
    strip -o "$work/init/tests" "$1"
    cat > "$work/init/init" <<END
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox grep -m1 'model name' /proc/cpuinfo
/bin/busybox grep -m1 -o -w -E 'amx_[a-z0-9]*|avx512_bf16|avx512_vnni' /proc/cpuinfo
echo -1 > /proc/sys/kernel/sched_rt_runtime_us
export MOEBIUS_ISA=amx
/bin/chrt -f 10 /tests --test-threads 1 --skip simulated_tiles --skip packed_rows_decode \
    ${filters[*]@Q}
echo "exit status \$?"
/bin/busybox sleep 1
/bin/busybox poweroff -f
END
    chmod +x "$work/init/init"
    (cd "$work/init" && find . | ./bin/busybox cpio -o -H newc 2> /dev/null | gzip -1) > "$work/disk/initrd"
    cp "$root"/usr/lib/modules/*/vmlinuz "$work/disk/vmlinuz"
    cp "$root/usr/lib/ISOLINUX/isolinux.bin" "$root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$work/disk/"
    cat > "$work/disk/isolinux.cfg" <<END
DEFAULT tests
LABEL tests
  KERNEL vmlinuz
  INITRD initrd
  APPEND console=ttyS0,115200 quiet nokaslr mitigations=off panic=-1 no5lvl rdinit=/init
END
    "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/xorriso" -as mkisofs -quiet \
        -o "$work/disk.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table "$work/disk"
}

emulate() {
    : > "$work/serial.log"
    cat > "$work/bochsrc" <<END
cpu: model=sapphire_rapids, count=1, ips=200000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=$root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$root/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$work/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial.log
display_library: nogui
clock: sync=none
log: $work/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
END
    # Switching off ends Bochs with an error.
    timeout "$seconds" nice -n 19 "$work/bochs/bochs" -q -f "$work/bochsrc" > "$work/terminal.log" 2>&1 || true
}

fetch_packages
build_emulator
tests=$(build_tests)
[ -x "$tests" ] || { echo "cargo named no test program" >&2; exit 1; }
make_disk "$tests"
emulate
cat "$work/serial.log"
grep -q '^exit status 0' "$work/serial.log"
