//! Business members, and the links to them from each other and from gateways.

use super::*;

impl World {
    pub(super) fn feed(&mut self, i: usize, input: Input) {
        let now = self.time();
        let member = &mut self.business[i];
        if member.paused {
            // A stopped process; what it would have ticked is lost, what it was sent waits in its sockets.
            if !matches!(input, Input::Tick) {
                member.backlog.push(input);
            }
            return;
        }
        let Some(core) = &mut member.core else { return };
        core.handle(now, input);
        self.carry_out(i);
    }

    /// Does what a member wants done, and calls it again for the commit that waits for its time.
    pub(super) fn carry_out(&mut self, i: usize) {
        let member = &mut self.business[i];
        let Some(core) = &mut member.core else { return };
        let (outputs, boot) = (core.take_outputs(), member.boot);
        if let Some(at) = core.commit_at() {
            self.at(at.as_micros() as u64, What::BusinessCommit(i, boot));
        }
        for output in outputs {
            match output {
                Output::Frame { link, frame } => self.send_to_client(link.0, frame),
                Output::Call { call, request } => {
                    let delay = self.latency();
                    self.after(delay, What::AskStore(i, boot, call, Box::new(request)));
                }
                Output::Report(report) => {
                    let (id, delay) = (self.business[i].id.clone(), self.latency());
                    self.after(delay, What::ToControl(id, report));
                }
                Output::Peer { to, frame } => self.send_to_server(Process::Business(i), &to, frame),
                Output::Members(members) => {
                    let members: Vec<MemberId> = members.into_iter().map(|(id, _)| id).collect();
                    self.dial_members(Process::Business(i), &members);
                    self.business[i].members = members;
                }
                Output::CloseLink(link) => self.break_pipe(link.0),
            }
        }
    }

    pub(super) fn crash(&mut self, process: Process) {
        let id = match process {
            Process::Business(i) => {
                let member = &mut self.business[i];
                if member.core.take().is_none() {
                    return;
                }
                member.backlog.clear();
                member.paused = false;
                member.id.clone()
            }
            Process::Gateway(i) => {
                if !std::mem::replace(&mut self.gateways[i].alive, false) {
                    return;
                }
                self.gateways[i].paused = false;
                self.gateways[i].backlog.clear();
                for person in 0..self.people.len() {
                    if self.people[person].gateway == i
                        && let Some(connection) = self.people[person].connection
                    {
                        self.people[person].gateway = self.rng.random_range(0..GATEWAYS);
                        self.connection_ends(person, connection);
                    }
                }
                self.gateways[i].id.clone()
            }
        };
        let ours: Vec<u64> =
            self.pipes.iter().filter(|(_, pipe)| pipe.open && self.ends_at(pipe, process)).map(|(id, _)| *id).collect();
        for pipe in ours {
            self.break_pipe(pipe);
        }
        if self.rng.random() {
            self.tell_coordinator(Event::MemberGone { member: id, confirmed_dead: true });
        }
        let pause = self.rng.random_range(50 * MS..6 * SECOND);
        self.after(pause, What::Restart(process));
    }

    pub(super) fn ends_at(&self, pipe: &Pipe, process: Process) -> bool {
        pipe.client.0 == process || Process::Business(pipe.server.0) == process
    }

    pub(super) fn restart(&mut self, process: Process) {
        match process {
            Process::Business(i) => {
                let name = self.business[i].id.name().to_owned();
                let id = self.member_id(&name);
                let now = self.time();
                let member = &mut self.business[i];
                member.id = id.clone();
                member.boot += 1;
                member.members.clear();
                member.core = Some(Core::new(id, Limits { notify_window: 64, ..Limits::default() }, now));
                let boot = member.boot;
                self.after(0, What::BusinessTick(i, boot));
                self.feed(i, Input::ControlUp(Hello { role: control::Role::Business.into(), ..Hello::default() }));
            }
            Process::Gateway(i) => {
                let name = self.gateways[i].id.name().to_owned();
                let id = self.member_id(&name);
                let gateway = &mut self.gateways[i];
                gateway.shared = shared(id.boot());
                gateway.id = id;
                gateway.alive = true;
                gateway.boot += 1;
                gateway.router = Router::new(SHARDS, router::Limits::default());
                gateway.sessions.clear();
                gateway.members.clear();
                gateway.version = (0, 0);
                let boot = gateway.boot;
                self.after(0, What::GatewayTick(i, boot));
                self.gateway_hello(i);
            }
        }
    }
}

impl World {
    pub(super) fn dial_members(&mut self, client: Process, members: &[MemberId]) {
        for server in 0..BUSINESS {
            let is_self = client == Process::Business(server);
            if !is_self && members.contains(&self.business[server].id) && self.pipe_to(client, server).is_none() {
                let delay = self.latency();
                self.after(delay, What::Dial(client, server));
            }
        }
    }

    pub(super) fn boot_of(&self, process: Process) -> Option<u64> {
        match process {
            Process::Business(i) => self.business[i].core.as_ref().map(|_| self.business[i].boot),
            Process::Gateway(i) => self.gateways[i].alive.then_some(self.gateways[i].boot),
        }
    }

    /// The open pipe of two processes.
    pub(super) fn pipe_to(&self, client: Process, server: usize) -> Option<u64> {
        let boots = (self.boot_of(client)?, self.boot_of(Process::Business(server))?);
        let is_it = |pipe: &Pipe| pipe.open && pipe.client == (client, boots.0) && pipe.server == (server, boots.1);
        self.pipes.iter().find(|(_, pipe)| is_it(pipe)).map(|(id, _)| *id)
    }

    pub(super) fn dial(&mut self, client: Process, server: usize) {
        let (Some(client_boot), Some(server_boot)) = (self.boot_of(client), self.boot_of(Process::Business(server)))
        else {
            return;
        };
        let known = match client {
            Process::Business(i) => &self.business[i].members,
            Process::Gateway(i) => &self.gateways[i].members,
        };
        let server_id = self.business[server].id.clone();
        if self.pipe_to(client, server).is_some() || !known.contains(&server_id) {
            return;
        }
        self.counter += 1;
        let id = self.counter;
        self.pipes.insert(
            id,
            Pipe { client: (client, client_boot), server: (server, server_boot), open: true, arrivals: [0; 2] },
        );
        let (peer, role) = match client {
            Process::Business(i) => (self.business[i].id.clone(), Role::Business),
            Process::Gateway(i) => (self.gateways[i].id.clone(), Role::Gateway),
        };
        self.feed(server, Input::LinkOpened { link: LinkId(id), peer, role });
        match client {
            Process::Business(i) => self.feed(i, Input::PeerUp(server_id)),
            Process::Gateway(i) => {
                self.gateways[i].router.link_up(&server_id);
                self.pump(i);
            }
        }
    }

    pub(super) fn break_pipe(&mut self, id: u64) {
        let Some(pipe) = self.pipes.get_mut(&id).filter(|pipe| pipe.open) else { return };
        pipe.open = false;
        let (client, server) = (pipe.client, pipe.server);
        let noticed = self.rng.random_range(0..2_900 * MS);
        self.after(noticed, What::ServerNotices(id));
        let server_id = self.business[server.0].id.clone();
        if self.boot_of(client.0) == Some(client.1) {
            match client.0 {
                Process::Business(i) => self.feed(i, Input::PeerDown(server_id)),
                Process::Gateway(i) => self.gateways[i].router.link_down(&server_id),
            }
            let pause = self.rng.random_range(20 * MS..800 * MS);
            self.after(pause, What::Dial(client.0, server.0));
        }
    }

    pub(super) fn arrival(&mut self, id: u64, direction: usize) -> Option<Micros> {
        let latency = self.latency();
        let pipe = self.pipes.get_mut(&id).filter(|pipe| pipe.open)?;
        pipe.arrivals[direction] = (self.now + latency).max(pipe.arrivals[direction]);
        Some(pipe.arrivals[direction])
    }

    pub(super) fn send_to_server(&mut self, client: Process, to: &MemberId, frame: ClientFrame) {
        let Some(server) = self.business.iter().position(|member| member.id == *to) else { return };
        let Some(pipe) = self.pipe_to(client, server) else { return };
        if let Some(at) = self.arrival(pipe, 0) {
            self.at(at, What::ToServer(pipe, vec![frame]));
        }
    }

    pub(super) fn send_to_client(&mut self, pipe: u64, frame: ServerFrame) {
        if let Some(at) = self.arrival(pipe, 1) {
            self.at(at, What::ToClient(pipe, vec![frame]));
        }
    }

    pub(super) fn server_of(&self, pipe: u64) -> Option<usize> {
        let pipe = self.pipes.get(&pipe).filter(|pipe| pipe.open)?;
        (self.boot_of(Process::Business(pipe.server.0)) == Some(pipe.server.1)).then_some(pipe.server.0)
    }

    pub(super) fn frames_to_client(&mut self, id: u64, frames: Vec<ServerFrame>) {
        let Some(pipe) = self.pipes.get(&id).filter(|pipe| pipe.open) else { return };
        let (client, server) = (pipe.client, pipe.server.0);
        let peer = self.business[server].id.clone();
        match client.0 {
            Process::Business(i) => self.feed(i, Input::PeerFrames { peer, frames }),
            Process::Gateway(i) => self.gateway_frames(i, &peer, frames),
        }
    }
}
