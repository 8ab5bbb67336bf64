//! scratch
use pepsal_tests::*; use std::time::Duration; use std::net::UdpSocket;
fn main()->anyhow::Result<()>{
 let a:Vec<String>=std::env::args().collect();
 let rate:u64=a[2].parse()?; let rtt=Duration::from_millis(a[3].parse()?); let loss:f64=a[4].parse()?;
 let p=LinkProfile::symmetric(rate,rtt,loss);
 let t=Topology::builder().link(Link::Tun(p)).build()?;
 match a[1].as_str(){
  "ping"=>{ let o=t.client.command("ping").args(["-c","20","-i","0.2","10.2.0.2"]).output()?; println!("{}",String::from_utf8_lossy(&o.stdout)); 
   let o=t.gateway.command("tc").args(["qdisc","show"]).output()?; println!("{}",String::from_utf8_lossy(&o.stdout));
  }
  "iperf"=>{ let mut s=t.server.command("iperf3").args(["-s","-1"]).stdout(std::process::Stdio::null()).spawn()?; std::thread::sleep(Duration::from_millis(500));
    let o=t.client.command("iperf3").args(["-c","10.2.0.2"]).args(&a[5..]).output()?; println!("{}{}",String::from_utf8_lossy(&o.stdout),String::from_utf8_lossy(&o.stderr)); s.wait()?; }
  "tcp"=>{ let cc=&a[5]; let n:u64=a[6].parse()?; let s=Server::with_congestion(&t.server,cc)?;
    for (name,tr) in [("up",Transfer::upload(n)),("down",Transfer::download(n))] {
     let o=tr.connector(Connector{congestion:Some(cc.clone()),timeout:Duration::from_secs(120),..Default::default()}).run(&t.client,s.address(Family::V4))?;
     println!("{cc} {name} {n} {:.2}s {:.2} Mbit/s intact {}",o.elapsed.as_secs_f64(),n as f64*8e-6/o.elapsed.as_secs_f64(),o.intact);} }
  "udp"=>{ // echo rtt, then saturate at 1.2x and measure arrival rate
    let srv=t.server.run(||UdpSocket::bind("10.2.0.2:9000"))?; let cl=t.client.run(||UdpSocket::bind("10.1.0.2:0"))?; cl.connect("10.2.0.2:9000")?;
    let mut b=[0u8;2000]; let mut rtts=vec![];
    for _ in 0..10 { let s=std::time::Instant::now(); cl.send(b"x")?; let (n,a)=srv.recv_from(&mut b)?; srv.send_to(&b[..n],a)?; cl.recv(&mut b)?; rtts.push(s.elapsed().as_secs_f64()*1e3);} println!("rtt ms {rtts:.3?}");
    let len=1472usize; let secs=4.0; let pps=rate as f64*1.2/8.0/(len as f64+28.0);
    let h=std::thread::spawn(move||{ srv.set_read_timeout(Some(Duration::from_secs(2))).ok(); let mut b=[0u8;2000]; let mut first=None; let mut last=std::time::Instant::now(); let mut n=0u64; let start=std::time::Instant::now();
      while let Ok(l)=srv.recv(&mut b){ let now=std::time::Instant::now(); if now-start>Duration::from_millis(1500){ if first.is_none(){first=Some(now);} else {n+=l as u64+28;} last=now; } if now-start>Duration::from_millis(4000){break} }
      let d=(last-first.unwrap()).as_secs_f64(); (n as f64*8.0/d, d)});
    let s=std::time::Instant::now(); let mut sent=0f64; while s.elapsed().as_secs_f64()<secs { let due=s.elapsed().as_secs_f64()*pps; while sent<due { cl.send(&b[..len]).ok(); sent+=1.0;} std::thread::sleep(Duration::from_micros(500)); }
    let (r,d)=h.join().unwrap(); println!("arrival rate {:.3} Mbit/s over {d:.2}s = {:.4} of {rate}; sent {sent}",r/1e6,r/rate as f64); }
  _=>{}}
 println!("{:#?}",t.link_counters()); Ok(()) }
