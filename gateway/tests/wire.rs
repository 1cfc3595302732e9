//! Our bytes against an independent codec, both ways.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/harness.rs"]
mod harness;

use bytes::Bytes;
use im_gateway::mqtt::{self, Delivery, OutBuffer, Packet, Reason, Version, Welcome};
use mqtt_protocol_core::mqtt::packet::{Property, Qos, SubEntry, SubOpts, UserProperty, v3_1_1, v5_0};
use proptest::prelude::*;

/// First byte's flags and body of the only packet in a buffer.
fn body(mut out: OutBuffer) -> (u8, Vec<u8>) {
    let waiting = out.len();
    let bytes = out.take_bytes();
    assert_eq!(waiting, bytes.len(), "the buffer knows its length");
    let length_bytes = 1 + bytes[1..].iter().take_while(|byte| **byte & 0x80 != 0).count();
    (bytes[0] & 15, bytes[1 + length_bytes..].to_vec())
}

fn whole(bytes: &[u8], version: Option<Version>) -> Packet<'_> {
    for end in 0..bytes.len() {
        assert_eq!(mqtt::decode(version, &bytes[..end], 1 << 20), Ok(None), "a packet cut at {end}");
    }
    let (packet, used) = mqtt::decode(version, bytes, 1 << 20).unwrap().unwrap();
    assert_eq!(used, bytes.len());
    assert_eq!(mqtt::decode(version, bytes, bytes.len() - 1).unwrap_err().reason, Reason::PacketTooLarge);
    packet
}

fn user_property(name: &str, value: &str) -> Property {
    Property::UserProperty(UserProperty::new(name, value).unwrap())
}

proptest! {
    #[test]
    fn what_we_publish_others_read(
        pieces in proptest::collection::vec("[a-z0-9$]{1,20}", 1..6),
        properties in proptest::collection::vec(("[a-z]{1,9}", "[ -~]{0,40}"), 0..4),
        payload in proptest::collection::vec(any::<u8>(), 0..3_000),
        packet_id in any::<u16>(),
    ) {
        let topic: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let user_properties: Vec<(&str, &str)> = properties.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let payload = Bytes::from(payload);
        let delivery = Delivery { topic: &topic, packet_id, user_properties: &user_properties, payload: &payload };
        let encode = |version| {
            let mut out = OutBuffer::default();
            delivery.encode(&mut out, version);
            assert_eq!(out.len(), delivery.size(version));
            body(out)
        };
        let (flags, bytes) = encode(Version::V5);
        let (publish, used) = v5_0::Publish::parse(flags, bytes.clone().into()).unwrap();
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!(publish.topic_name(), topic.join("/"));
        prop_assert_eq!(publish.payload().as_slice(), &payload[..]);
        prop_assert_eq!(publish.packet_id().unwrap_or(0), packet_id);
        let expected: Vec<Property> = user_properties.iter().map(|(name, value)| user_property(name, value)).collect();
        prop_assert_eq!(format!("{:?}", publish.props()), format!("{expected:?}"));
        let (flags, bytes) = encode(Version::V311);
        let (publish, _) = v3_1_1::Publish::parse(flags, bytes.into()).unwrap();
        prop_assert_eq!(publish.topic_name(), topic.join("/"));
        prop_assert_eq!(publish.payload().as_slice(), &payload[..]);
    }

    #[test]
    fn what_we_answer_others_read(packet_id in 1u16.., text in "[ -~]{0,200}", value in "[0-9]{1,20}", keep_alive in any::<Option<u16>>()) {
        let mut out = OutBuffer::default();
        mqtt::puback(&mut out, Version::V5, packet_id, Reason::QuotaExceeded, &text, &[("seq", &value)]);
        let (puback, _) = v5_0::Puback::parse(&body(out).1).unwrap();
        prop_assert_eq!((puback.packet_id(), puback.reason_code().map(|code| code as u8)), (packet_id, Some(0x97)));
        let mut out = OutBuffer::default();
        mqtt::suback(&mut out, Version::V5, packet_id, &[1, 0x8F], &text);
        prop_assert!(v5_0::Suback::parse(&body(out).1).is_ok());
        let mut out = OutBuffer::default();
        mqtt::unsuback(&mut out, Version::V5, packet_id, &[0, 0x11]);
        prop_assert!(v5_0::Unsuback::parse(&body(out).1).is_ok());
        let mut out = OutBuffer::default();
        mqtt::disconnect(&mut out, Version::V5, Reason::UseAnotherServer, &text);
        prop_assert!(v5_0::Disconnect::parse(&body(out).1).is_ok());
        let welcome = Welcome {
            session_present: true,
            session_expiry_s: 7,
            receive_maximum: packet_id,
            packet_size_max: 1_000,
            assigned_client_id: Some(&value),
            server_keep_alive_s: keep_alive,
        };
        let mut out = OutBuffer::default();
        mqtt::connack(&mut out, Version::V5, &welcome);
        prop_assert!(v5_0::Connack::parse(&body(out).1).unwrap().0.session_present());
        let mut out = OutBuffer::default();
        mqtt::connack_refused(&mut out, Version::V5, Reason::NotAuthorized, &text);
        prop_assert_eq!(v5_0::Connack::parse(&body(out).1).unwrap().0.reason_code() as u8, 0x87);
    }

    #[test]
    fn what_others_send_we_read(
        topic in "[a-z/]{1,40}", payload in proptest::collection::vec(any::<u8>(), 0..2_000), id in "[ -~]{1,64}", packet_id in 1u16..,
        user in "[a-z]{1,20}", password in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let publish = v5_0::Publish::builder().topic_name(topic.as_str()).unwrap().qos(Qos::AtLeastOnce).packet_id(packet_id);
        let publish = publish.props(vec![user_property("id", &id)]).payload(payload.clone()).build().unwrap().to_continuous_buffer();
        let Packet::Publish(read) = whole(&publish, Some(Version::V5)) else { panic!("not a PUBLISH") };
        prop_assert_eq!((read.topic, read.payload, read.id, read.packet_id, read.qos), (&*topic, &*payload, Some(&*id), packet_id, 1));
        let publish = v3_1_1::Publish::builder().topic_name(topic.as_str()).unwrap().payload(payload.clone()).build().unwrap();
        let publish = publish.to_continuous_buffer();
        let Packet::Publish(read) = whole(&publish, Some(Version::V311)) else { panic!("not a PUBLISH") };
        prop_assert_eq!((read.topic, read.payload, read.qos), (&*topic, &*payload, 0));
        let entry = SubEntry::new(topic.as_str(), SubOpts::new().set_qos(Qos::ExactlyOnce)).unwrap();
        let subscribe = v5_0::Subscribe::builder().packet_id(packet_id).entries(vec![entry]).build().unwrap().to_continuous_buffer();
        let Packet::Subscribe(read) = whole(&subscribe, Some(Version::V5)) else { panic!("not a SUBSCRIBE") };
        prop_assert_eq!(read.filters, [(&*topic, 2)]);
        let connect = v5_0::Connect::builder().client_id("d").unwrap().user_name(user.as_str()).unwrap().password(password.clone()).unwrap();
        let connect = connect.clean_start(true).build().unwrap().to_continuous_buffer();
        let Packet::Connect(read) = whole(&connect, None) else { panic!("not a CONNECT") };
        prop_assert_eq!((read.version, read.username, read.password), (Version::V5, Some(&*user), Some(&*password)));
        let connect = v3_1_1::Connect::builder().client_id("d").unwrap().user_name(user.as_str()).unwrap().password(password.clone()).unwrap();
        let connect = connect.build().unwrap().to_continuous_buffer();
        let Packet::Connect(read) = whole(&connect, None) else { panic!("not a CONNECT") };
        prop_assert_eq!((read.version, read.username, read.password), (Version::V311, Some(&*user), Some(&*password)));
    }

    /// The harness of the fuzz target, with bytes that look like packets often enough.
    #[test]
    fn any_bytes_are_answered_or_end_the_session(
        packets in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..100)), 0..20),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        harness::feed(&noise);
        let mut input = Vec::new();
        for (first, body) in packets {
            input.extend([first, body.len() as u8]);
            input.extend(body);
        }
        harness::feed(&input);
    }

    /// The same with packets that are right, so that the session lives through many answers, pushes and ticks.
    #[test]
    fn whatever_owners_answer_and_when_no_session_breaks(
        packets in proptest::collection::vec((0u8..6, 1u8..9), 1..40),
        choices in proptest::collection::vec(any::<u8>(), 1..400),
    ) {
        for version in [Version::V5, Version::V311] {
            let mut input: Vec<u8> = packets.iter().flat_map(|(kind, id)| right_packet(version, *kind, *id)).collect();
            input.extend(&choices);
            harness::feed_one(version, &input);
        }
    }
}

fn right_packet(version: Version, kind: u8, id: u8) -> Vec<u8> {
    let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    let (first, body): (u8, Vec<u8>) = match kind {
        0 | 1 => (0x82, [&[0, id], properties, b"\0\x07inbox/#\x01"].concat()),
        2 => (0xA2, [&[0, id], properties, b"\0\x07inbox/#"].concat()),
        3 => (0x32, [b"\0\x05u/bob\0", &[id][..], properties, b"hello"].concat()),
        4 => (0x82, [&[0, id], properties, b"\0\x07r/stage\0"].concat()),
        _ => (0x40, vec![0, id]),
    };
    [&[first, body.len() as u8], &body[..]].concat()
}
