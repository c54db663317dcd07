use std::time::Instant;
use moebius_kernels::quantised::*;
use moebius_kernels::formats::Format;
use moebius_kernels::machine;
use std::time::Duration;
fn main(){
    let pool=rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
    let f=Format::Q4_0;
    for (n,k,count) in [(2048usize,2048usize,256usize),(2048,1024,512),(50304,2048,8)] {
        let ws:Vec<_>=(0..count).map(|_| { let src=vec![0x11u8; n*k/f.block_len()*f.block_bytes()]; QuantisedMatrix::pack(f,n,k,&src)}).collect();
        let bytes:usize=ws.iter().map(|w| w.bytes().len()).sum();
        let per = if count>8 {8} else {1};
        let x:Vec<f32>=(0..per*k).map(|i| (i%97) as f32).collect(); let mut y=vec![0.0;per*n];
        let off:Vec<usize>=(0..=per).collect();
        let mut best=0.0f64; let mut all=vec![];
        for _ in 0..8 {
            let t=Instant::now();
            for c in ws.chunks(per) { grouped_quantised_matmul(&x,None,&off,c,&mut y); }
            let r=bytes as f64/t.elapsed().as_secs_f64()/1e9; best=best.max(r); all.push(format!("{r:.1}"));
        }
        println!("{n}x{k} x{count} ({:.2} GB): best {best:.1} GB/s  {all:?}; bandwidth {:.1}", bytes as f64/1e9, machine::read_bandwidth(1<<29, Duration::from_millis(500))/1e9);
    }
    });
}
