//! scratch
use pepsal_tests::*; use std::time::Duration;
fn main()->anyhow::Result<()>{
 let a:Vec<String>=std::env::args().collect(); let cc=a[1].clone(); let loss:f64=a[2].parse()?; let sizes:Vec<u64>=a[3..].iter().map(|s|s.parse().unwrap()).collect();
 for n in sizes { let mut hs=vec![]; for seed in 0..12u64 { let cc=cc.clone(); hs.push(std::thread::spawn(move|| ->anyhow::Result<_>{ 
   let t=Topology::builder().link(Link::Tun(LinkProfile{seed:seed/2+1,loss,..LinkProfile::GEO})).build()?; let s=Server::with_congestion(&t.server,&cc)?;
   let tr=if seed%2==0 {Transfer::upload(n)} else {Transfer::download(n)};
   let o=tr.connector(Connector{congestion:Some(cc),timeout:Duration::from_secs(200),..Default::default()}).run(&t.client,s.address(if seed%4<2 {Family::V4} else {Family::V6}))?; let c=t.link_counters().unwrap(); Ok((o.elapsed.as_secs_f64(),o.intact, c.up.lost,c.up.dropped,c.down.lost,c.down.dropped))}));}
  print!("{cc} {n} up/down: "); for h in hs { let r=h.join().unwrap()?; print!("{:.1}{} ",r.0, if r.1{""} else {"!"}); } println!(); }
 Ok(()) }
