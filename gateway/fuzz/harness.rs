// Sessions to test with, and what a client may send into one, byte for byte: used by the fuzz target and by the tests of the gateway.

use std::sync::Arc;

use im_gateway::metrics::Metrics;
use im_gateway::mqtt::{self, Connect, Packet, Version};
use im_gateway::session::{Answer, Effects, Identity, Session, SessionLimits, Shared};

/// Small limits, so that they are met.
pub fn shared() -> Arc<Shared> {
    let limits = SessionLimits {
        receive_maximum: 4,
        packet_size_max: 65_536,
        keep_alive_s_max: 100,
        session_expiry_s_max: 1_000,
        catch_up: 1_000,
        send_buffer_bytes: 32_768,
    };
    Shared::new(0xB007, limits, Metrics::new())
}

/// What alice's phone says first.
pub fn connect(version: Version) -> Connect<'static> {
    Connect {
        version,
        clean_start: false,
        keep_alive_s: 60,
        session_expiry_s: (version == Version::V5).then_some(500),
        receive_maximum: 10,
        packet_size_max: None,
        problem_information: true,
        client_id: "phone",
        will: None,
        username: Some("alice"),
        password: None,
    }
}

/// Feeds `input` to a session of each version. Every request is refused at once, so that answers run as well.
/// The out-buffer must stay in proportion to the input.
pub fn feed(input: &[u8]) {
    // A first packet of any kind.
    let _ = mqtt::decode(None, input, 65_536);
    for version in [Version::V5, Version::V311] {
        let mut effects = Effects::default();
        let identity = |_: &str, _: Option<&[u8]>| Ok(Identity { expires_at_ms: None });
        let opened = Session::open(&shared(), 8, 0, 1, &connect(version), identity, &mut effects);
        let Ok(mut session) = opened else { return };
        let Some(ticket) = effects.requests.pop().and_then(|request| request.ticket) else { return };
        let registered = registration();
        session.on_answer(0, ticket, Answer::Outcome(registered), &mut effects);
        let mut rest = input;
        while !session.is_ended() {
            match mqtt::decode(Some(version), rest, 65_536) {
                Ok(None) => break,
                Ok(Some((Packet::Connect(_), _))) => unreachable!("decode refuses a second CONNECT"),
                Ok(Some((packet, used))) => {
                    session.on_packet(1, packet, &mut effects);
                    rest = &rest[used..];
                }
                Err(error) => session.on_bad_input(error, &mut effects),
            }
            for request in std::mem::take(&mut effects.requests) {
                if let Some(ticket) = request.ticket {
                    session.on_answer(1, ticket, Answer::Full, &mut effects);
                }
            }
        }
        let written = session.take_output().len();
        assert!(written <= 1_024 + 64 * input.len(), "{written} bytes out for {} in", input.len());
    }
}

fn registration() -> im_proto::link::reply::Outcome {
    let number = Some(im_proto::link::SessionNumber { epoch: 1, counter: 1 });
    im_proto::link::reply::Outcome::Registered(im_proto::link::Registered { number, ..Default::default() })
}
